"""Stored pairs in stages, the easiest first; nothing but the epoch says which stage it is.

Everything that reads, resumes and deals out pairs knows epochs and positions in them. So a stage
is made an epoch: one of a set length, which goes on through the pairs that are open by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2s
from typing import Any, Literal

from braceexpand import braceexpand
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.data.images import Size
from lit_prefopt.data.loading.loader import ResumableLoader
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.format import INDEX, STAGE_FOLDER, Shard
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.utils.filesystem import filesystem, retry


class CurriculumOrder:
    """An order whose epochs are stages: each goes through the epochs of its plan without a break.

    A stage may be shorter or longer than an epoch of its plan. The epochs behind the last stage go
    on where that one ended.

    Args:
        plans: The order of the pairs that are open in each stage.
        samples: How many pairs are seen in a stage.
        contents: A text that tells the shards apart.
    """

    def __init__(self, plans: Sequence[Plan], samples: int, contents: str = "") -> None:
        self.plans, self.samples, self.contents = plans, samples, contents
        self.seed = plans[0].seed

    def slice(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard number, sample number) of the positions start to stop of a stage."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"[{start}, {stop}) leaves the {self.samples} samples of a stage")
        stage = min(epoch, len(self.plans) - 1)
        plan, before = self.plans[stage], (epoch - stage) * self.samples
        start, stop = start + before, stop + before
        places: list[tuple[int, int]] = []
        while start < stop:
            inner, first = divmod(start, plan.samples)
            last = min(plan.samples, first + stop - start)
            places += plan.slice(inner, first, last)
            start += last - first
        return places

    def bucket(self, epoch: int, position: int) -> int:
        """Return the number of a position's bucket: here all share one."""
        return 0

    def fingerprint(self) -> str:
        """Return a short text that two orders share only if they are the same."""
        parts = [plan.fingerprint() for plan in self.plans]
        text = "/".join(["curriculum", str(self.samples), self.contents, *parts])
        return blake2s(text.encode(), digest_size=8).hexdigest()


class StageLoader(ResumableLoader):
    """A loader whose epochs are stages, which must stay as long as they were."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the place that a checkpoint holds."""
        if state["samples"] != self.epoch_progress.samples:
            raise InputError(
                f"The checkpoint was made with stages of {state['samples']} pairs, not of "
                f"{self.epoch_progress.samples}; give the same `stage_steps` and the same "
                "effective batch (`batch.pairs`), or start a new run."
            )
        super().load_state_dict(state)


class CurriculumPairs(PairShards):
    """Pairs of images that come in stages: at first the easiest alone, at the end all of them.

    A stage trains on its own pairs and on those of all stages before it, for a set number of
    optimizer steps; after the last stage training goes on with all pairs. A stage is what the
    Trainer calls an epoch. A checkpoint resumes where it was taken, also on another number of ranks
    if the effective batch stays the same. With one stage it is `PairShards`.

    Args:
        stages: The folder or URL that `lit-prefopt shards stages` wrote, or the stages themselves,
            the easiest first: a list of folders or URLs of shards, or one of them in which
            {1..5} stands for the numbers of the stages. In reversed order they are the control.
        stage_steps: Optimizer steps of a stage.
        batch_size: Pairs in a batch of one rank.
        resolution: Width and height of the images that come out.
        validation: The held-out shards, a folder or URL or a list of them; none: no validation.
        crop: Which part of an image of another shape is used: the middle, or a random one, the
            same for both sides. Validation always takes the middle.
        flip: Mirror half of the pairs, both sides alike; not for texts that speak of left and
            right. Validation never does.
        caption_dropout: Share of the training pairs whose prompt is left empty.
        workers: Processes that read and decode, for each rank; 0 does it in the main process.
        seed: Seed of the order, the crops, the flips and whatever else is drawn for a sample.
        shards_per_block: How many shards are shuffled among each other at a time.
        broken_share: Largest share of unreadable pairs that others may stand in for; 0 stops at
            the first one.
        validation_pairs: How many pairs validation uses at most; none: all.
        cache: Folder that remote shards are kept in, shared by all processes of a machine; none:
            `lit-prefopt` in $XDG_CACHE_HOME or ~/.cache.
        cache_size: Most bytes that they take; those opened longest ago make room.
    """

    def __init__(
        self,
        stages: str | list[str],
        stage_steps: int,
        batch_size: int,
        resolution: int,
        validation: str | list[str] | None = None,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        caption_dropout: float = 0.0,
        workers: int = 2,
        seed: int = 0,
        shards_per_block: int = 8,
        broken_share: float = 0.01,
        validation_pairs: int | None = None,
        cache: str | None = None,
        cache_size: int = 64_000_000_000,
    ) -> None:
        super().__init__(
            shards=stages,
            batch_size=batch_size,
            resolution=resolution,
            validation=validation,
            crop=crop,
            flip=flip,
            caption_dropout=caption_dropout,
            workers=workers,
            seed=seed,
            shards_per_block=shards_per_block,
            broken_share=broken_share,
            validation_pairs=validation_pairs,
            cache=cache,
            cache_size=cache_size,
        )
        check_number("stage_steps", stage_steps, 1)
        if not stages:
            raise InputError("No stages are named; give `--data.stages FOLDER`.")
        self.stages, self.stage_steps = stages, stage_steps
        self._ends: list[int] = []  # of each stage's shards among all

    @property
    def stage(self) -> int:
        """The stage that training is in, counted from 1."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return min(epoch + 1, len(self._ends))

    def _find(self) -> list[Shard]:
        named = _stages(self.stages)
        shards: list[Shard] = []
        self._ends = []
        for name in named:
            found = find_shards(name)
            if not sum(len(shard.offsets) for shard in found):
                raise InputError(
                    f"The stage {name} holds no pair; leave it out, or make the stages again with "
                    "fewer of them."
                )
            shards += found
            self._ends.append(len(shards))
        urls = [shard.url for shard in shards]
        if len(set(urls)) < len(urls):
            twice = next(url for url in urls if urls.count(url) > 1)
            raise InputError(
                f"{twice} is in two stages; name it in the first of them alone, since each stage "
                "goes on with the pairs of those before it."
            )
        return shards

    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        if len(self._ends) == 1:
            self.resumable = ResumableLoader
            return super()._make_order()
        self.resumable = StageLoader
        counts = self.reader.counts
        plans = [Plan(counts[:end], self.seed, self.shards_per_block) for end in self._ends]
        self._log_stages([plan.samples for plan in plans])
        batches = self.trainer.accumulate_grad_batches if self.trainer else 1
        samples = self.stage_steps * batches * self._ranks(self.batch_size).global_batch
        # the same counts in another order are another curriculum
        contents = ",".join(str(shard.size) for shard in self.reader.shards)
        return CurriculumOrder(plans, samples, contents), [self.shaping.square]

    def _log_stages(self, pairs: Sequence[int]) -> None:
        rank_zero_info(
            f"{len(pairs)} stages of {self.stage_steps} steps with {', '.join(map(str, pairs))} "
            "pairs; after them training goes on with all."
        )
        steps = self.trainer.max_steps if self.trainer else -1
        opened = -(-steps // self.stage_steps)
        if 0 < opened < len(pairs):
            rank_zero_info(f"max_steps {steps} ends the run in stage {opened} of {len(pairs)}.")


def _stages(stages: str | Sequence[str]) -> list[str]:
    """Return the names of the stages that the user means."""
    if not isinstance(stages, str):
        return list(stages)
    if "{" in stages:
        try:
            return list(braceexpand(stages))
        except ValueError as error:
            raise InputError(f"{stages} has unbalanced braces; write {{1..5}}.") from error
    folder = stages.rstrip("/")
    fs, path = filesystem(folder)
    found: list[str] = []
    while True:
        name = STAGE_FOLDER.format(len(found) + 1)
        index = f"{path}/{name}/{INDEX}"
        if not retry(f"{folder}/{name}", partial(fs.exists, index)):
            break
        found.append(f"{folder}/{name}")
    if not found:
        raise InputError(
            f"{stages} has no {STAGE_FOLDER.format(1)} with an {INDEX}; name a folder that "
            "`lit-prefopt shards stages` wrote, or list the stages as "
            "`--data.stages [EASIEST, ..., HARDEST]`."
        )
    return found

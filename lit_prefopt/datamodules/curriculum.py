"""Data module of pairs in stages, easiest first; the epoch determines the stage.

Reading, resuming and distribution of pairs work by epoch and position. A stage is therefore one
epoch of fixed length, which passes through the pairs that are available in that stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2s
from typing import Any

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
    """An order whose epochs are stages: each stage passes through the epochs of its plan.

    A stage may be shorter or longer than an epoch of its plan. Epochs after the last stage continue
    its plan.

    Args:
        plans: Order of the pairs that are available in each stage.
        samples: Number of pairs in a stage.
        contents: Text that identifies the shards.
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
        """Return the bucket of a position: 0, since all pairs have one shape."""
        return 0

    def fingerprint(self) -> str:
        """Return a hash of the order."""
        parts = [plan.fingerprint() for plan in self.plans]
        text = "/".join(["curriculum", str(self.samples), self.contents, *parts])
        return blake2s(text.encode(), digest_size=8).hexdigest()


class StageLoader(ResumableLoader):
    """A resumable loader whose epochs are stages of fixed length."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of a checkpoint."""
        if state["samples"] != self.epoch_progress.samples:
            raise InputError(
                f"The checkpoint was made with stages of {state['samples']} pairs, not of "
                f"{self.epoch_progress.samples}; give the same `stage_steps` and the same "
                "effective batch (`batch.pairs`), or start a new run."
            )
        super().load_state_dict(state)


class CurriculumPairs(PairShards):
    """Pairs of images in stages: the easiest alone at first, all of them in the end.

    A stage trains on its own pairs and on those of all stages before it, for a fixed number of
    optimizer steps; after the last stage training continues with all pairs. A stage is an epoch of
    the Trainer. A checkpoint resumes at its exact position, also on another number of ranks if the
    effective batch stays the same. With a single stage this is `PairShards`.

    Args:
        stages: Folder or URL that `lit-prefopt shards stages` wrote, or the stages themselves, the
            easiest first: a list of folders or URLs of shards, or one of them with {1..5} for the
            numbers of the stages. In reversed order they are the control.
        stage_steps: Optimizer steps of a stage.
    """

    def __init__(self, stages: str | list[str], stage_steps: int, **kwargs: Any) -> None:
        # stages have one shape
        super().__init__(shards=stages, aspect_buckets=False, bucket_step=64, min_side=0, **kwargs)
        check_number("stage_steps", stage_steps, 1)
        if self.draws is not None:
            raise InputError(
                "A stage may show a pair more than once or not at all, so that pairs in stages "
                "have no fixed draws: leave `--data.draws` out."
            )
        if not stages:
            raise InputError("No stages are named; give `--data.stages FOLDER`.")
        self.stages, self.stage_steps = stages, stage_steps
        self._ends: list[int] = []  # of each stage's shards among all

    @property
    def stage(self) -> int:
        """Current stage, counted from 1."""
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
                    f"The stage {name} has no pairs; leave it out, or write the stages again with "
                    "fewer of them."
                )
            shards += found
            self._ends.append(len(shards))
        urls = [shard.url for shard in shards]
        if len(set(urls)) < len(urls):
            twice = next(url for url in urls if urls.count(url) > 1)
            raise InputError(
                f"{twice} is in two stages; name it only in the first of them, since each stage "
                "includes the pairs of those before it."
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
        # the same number of pairs in another order is another curriculum
        contents = ",".join(str(shard.size) for shard in self.reader.shards)
        return CurriculumOrder(plans, samples, contents), [self.shaping.square]

    def _log_stages(self, pairs: Sequence[int]) -> None:
        rank_zero_info(
            f"{len(pairs)} stages of {self.stage_steps} steps with {', '.join(map(str, pairs))} "
            "pairs; training then continues with all."
        )
        steps = self.trainer.max_steps if self.trainer else -1
        opened = -(-steps // self.stage_steps)
        if 0 < opened < len(pairs):
            rank_zero_info(f"max_steps {steps} ends the run in stage {opened} of {len(pairs)}.")


def _stages(stages: str | Sequence[str]) -> list[str]:
    """Return the folders of the stages that a recipe names."""
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

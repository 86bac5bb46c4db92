"""Data module of on-policy methods: prompts in, batches of the policy's roll-outs out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lit_prefopt.batches import Pairs, Steps
from lit_prefopt.data.loading.loader import PairLoader
from lit_prefopt.data.order.plan import Plan
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.datamodules.rollout_buffer import Collector, RolloutBuffer
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.prompts.base import Prompts
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.utils.seeds import sample_seed, stable_seed

BUFFERS = "buffers"
KEPT = 3  # buffers of earlier checkpoints that are kept on disk


class PromptCollections(LightningDataModule):
    """Collects roll-outs of the policy and yields batches of them, one collection per epoch.

    All ranks roll out prompts in rounds until every rank has enough for its batches, so that all
    take equally many steps, however many pairs each accepts. A collection is dropped before the
    next one, unless `keep` is given. Batches are shuffled passes over all collected rows.

    Args:
        prompts: Prompts to roll out, in shuffled order.
        batch_size: Pairs in a batch of one rank.
        batches: Batches between two collections.
        round_size: Prompts that each rank rolls out at a time.
        collection: New rows that each rank collects (pairs, or prompts if the method stores
            complete roll-outs); as many as its batches hold if not given.
        keep: Largest number of rows of each rank, earlier collections included; the oldest are
            dropped first. Nothing of earlier collections is kept if not given.
        validation: Folder or URL of held-out pair shards; no validation if not given.
        resolution: Width and height of the held-out images.
        validation_pairs: Largest number of held-out pairs; all if not given.
        patience: Consecutive rounds without a pair on some rank after which the run stops.
        seed: Seed of the order and of the roll-outs.
    """

    def __init__(
        self,
        prompts: Prompts,
        batch_size: int,
        batches: int,
        round_size: int,
        collection: int | None = None,
        keep: int | None = None,
        validation: str | list[str] | None = None,
        resolution: int = 512,
        validation_pairs: int | None = None,
        patience: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("batch_size", "batches", "round_size", "patience"):
            check_number(name, locals()[name], 1)
        check_number("collection", collection, 1, optional=True)
        check_number("keep", keep, 1, optional=True)
        self.collection = collection or batches * batch_size
        if keep is not None and keep < self.collection:
            raise InputError(
                f"keep is {keep}, less than the {self.collection} of one collection: raise it, or "
                "leave it out to keep nothing of earlier collections."
            )
        self.prompts, self.batch_size, self.batches = prompts, batch_size, batches
        self.round_size, self.patience, self.seed = round_size, patience, seed
        self.keep = keep
        self.used = 0  # prompts rolled out so far, over all ranks
        self.buffer: RolloutBuffer | None = None
        self._written = -1  # `used` of the buffer that is stored on disk
        self.held_out: PairShards | None = None
        if validation is not None:
            own: Any = {"resolution": resolution, "validation_pairs": validation_pairs}
            own |= {"validation": validation, "workers": 0}
            self.held_out = PairShards(validation, batch_size, **own)

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts, so that wrong ones fail at the start."""
        self.texts = self.prompts.texts()
        world = self.trainer.world_size if self.trainer else 1
        if len(self.texts) < world:
            raise InputError(
                f"{len(self.texts)} prompts are too few for {world} ranks: give more prompts."
            )
        self._order = Plan([len(self.texts)], self.seed)
        if self.held_out is not None:
            self.held_out.trainer = self.trainer
            self.held_out.setup("validate")

    @property
    def batches_per_epoch(self) -> int:
        """Number of training batches of an epoch on one rank."""
        return self.batches

    def train_dataloader(self) -> RolloutLoader:
        """Return the loader of the collected batches."""
        return RolloutLoader(self)

    def val_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs."""
        return [] if self.held_out is None else self.held_out.val_dataloader()

    def test_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs, as for validation."""
        return self.val_dataloader()

    @property
    def run(self) -> Trainer:
        """Trainer of the run."""
        if self.trainer is None:
            raise InputError("There is no Trainer yet: give the data module to `Trainer.fit`.")
        return self.trainer

    @property
    def collected(self) -> RolloutBuffer:
        """Buffer of the collected rows."""
        if self.buffer is None:
            raise InputError("There are no roll-outs yet: call `collect` first.")
        return self.buffer

    # Collecting ---------------------------------------------------------------------------------

    @property
    def module(self) -> Collector:
        """Method that collects roll-outs."""
        return cast("Collector", self.run.lightning_module)

    def collect(self) -> None:
        """Collect roll-outs of the current weights for the next prompts into this rank's buffer."""
        trainer, module = self.run, self.module
        if self.buffer is None or self.keep is None:
            self.buffer = RolloutBuffer(module.COLLECTS)
        bar = tqdm(
            total=self.collection,
            desc="collecting",
            leave=False,
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        )
        module.eval()
        made = empty = rounds = added = 0
        while self._over_ranks(made, "min") < self.collection:
            with trainer.precision_plugin.forward_context():
                one = module.collect(*self._next_round())
            count, rounds = len(one.seeds), rounds + 1
            if count and made < self.collection:  # further rows, while others collect, are dropped
                self.buffer.add(one, self.keep)
                added += 1
            bar.update(min(count, self.collection - bar.n))
            made += count
            empty = 0 if count or made >= self.collection else empty + 1
            if self._over_ranks(empty, "max") >= self.patience:
                raise InputError(
                    f"{self.patience} rounds of {self.round_size} prompts gave no pair: lower the "
                    "method's `threshold`, or take a judge whose scores differ more."
                )
        self.buffer.complete(added, module.complete)
        module.train()
        bar.close()
        rank_zero_info(f"Collected {made} from {rounds * self.round_size} prompts on this rank.")

    def batch(self, number: int) -> Steps | Pairs:
        """Return a batch of the epoch: the next rows of shuffled passes over the buffer."""
        buffer = self.collected
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        turns = [divmod(place, len(buffer)) for place in places]
        passes = {turn: self._pass(turn) for turn, _ in turns}
        which = torch.stack([passes[turn][place] for turn, place in turns])
        rank = self.run.global_rank
        seeds = [stable_seed("draw", self.seed, rank, self.used, place) for place in places]
        return buffer.batch(which, torch.tensor(seeds), self.module.draw)

    def _pass(self, turn: int) -> Tensor:
        """Return the order of one pass over the buffer."""
        source = torch.Generator().manual_seed(stable_seed("pass", self.seed, self.used, turn))
        return torch.randperm(len(self.collected), generator=source)

    def _next_round(self) -> tuple[list[str], Tensor]:
        """Return this rank's prompts of the next round, and their seeds."""
        rank, world = self.run.global_rank, self.run.world_size
        first = self.used + rank * self.round_size
        self.used += world * self.round_size
        texts, seeds = [], []
        for number in range(first, first + self.round_size):
            again, position = divmod(number, len(self.texts))
            [(_, place)] = self._order.slice(again, position, position + 1)
            texts.append(self.texts[place])
            seeds.append(sample_seed(self.seed, again, position))
        return texts, torch.tensor(seeds)

    def _over_ranks(self, number: int, how: str) -> float:
        value = torch.tensor(float(number), device=self.run.strategy.root_device)
        return float(self.run.strategy.reduce(value, reduce_op=how))

    # Resuming -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the prompts, and write the buffer if it is needed to resume."""
        progress: Any = self.run.fit_loop.epoch_loop.batch_progress
        amid = 0 < progress.current.processed < self.batches
        needed = self.buffer is not None and (amid or self.keep is not None)
        if needed:
            self._write()
            # rank 0 writes the checkpoint, which must not exist before the buffers of all ranks
            self.run.strategy.barrier()
        return {"used": self.used, "buffer": needed, "world": self.run.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of a checkpoint, with its buffer."""
        self.used = state["used"]
        if not state["buffer"]:
            return
        if state["world"] != self.run.world_size:
            raise InputError(
                f"The checkpoint has the roll-outs of {state['world']} ranks: resume with as many, "
                "or (without `keep`) from a checkpoint at the end of an epoch."
            )
        path = self._path()
        if not path.is_file():
            raise InputError(
                f"{path}, the checkpoint's roll-outs, is missing: name a later checkpoint."
            )
        self.buffer = RolloutBuffer(self.module.COLLECTS)
        self.buffer.fill(load_file(path))
        self._written = self.used

    def _path(self) -> Path:
        name = f"{self.used:09d}-rank{self.run.global_rank}.safetensors"
        return Path(self.run.default_root_dir) / BUFFERS / name

    def _write(self) -> None:
        path = self._path()
        if self._written == self.used:  # once per collection
            return
        with atomic_output(path, replace=True) as temporary:
            save_file(self.collected.tensors(), temporary)
        self._written = self.used
        mine = path.parent.glob(f"*-rank{self.run.global_rank}.safetensors")
        for old in sorted(mine, key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()


class RolloutLoader:
    """Loader of an epoch's batches; not a DataLoader, to which Lightning would add a sampler."""

    def __init__(self, data: PromptCollections) -> None:
        self.data = data

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self.data.batches

    def __iter__(self) -> Iterator[Steps | Pairs]:
        """Yield the remaining batches of the epoch."""
        data = self.data
        done = data.run.fit_loop.epoch_loop.batch_progress.current.ready
        if not done or data.buffer is None:
            data.collect()
        for number in range(done, data.batches):
            yield data.batch(number)

    def state_dict(self) -> dict[str, int]:
        """Return the length of an epoch, to check it on resuming."""
        return {"batches": self.data.batches, "batch_size": self.data.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that epochs are as long as in the checkpoint."""
        if state != self.state_dict():
            raise InputError(
                f"The checkpoint was made with {state['batches']} batches of "
                f"{state['batch_size']} pairs a collection; give the same numbers to resume."
            )

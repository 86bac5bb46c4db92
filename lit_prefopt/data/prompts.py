"""The data module of on-policy methods: prompts in, batches of what the policy made of them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lit_prefopt.batches import Steps
from lit_prefopt.data.loader import PairLoader
from lit_prefopt.data.pairs import PairShards
from lit_prefopt.data.plan import Plan
from lit_prefopt.data.seeds import sample_seed, stable_seed
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.prompts import Prompts
from lit_prefopt.whole_files import whole_output

if TYPE_CHECKING:  # the shards' commands import this package, and need no diffusion model
    from lit_prefopt.on_policy import OnPolicyModule

BUFFERS = "buffers"
KEPT = 3  # buffers of earlier checkpoints that stay on the disk


class PromptCollections(LightningDataModule):
    """Lets the policy roll out prompts, then hands out what it made, one collection an epoch.

    Rounds of roll-outs follow each other, on all ranks together, until every rank has enough for
    its batches, so that all ranks take equally many steps whatever each one accepts. What is over
    is dropped: the next collection is made by other weights.

    Args:
        prompts: The prompts; they are gone through in an order of their own.
        batch_size: Pairs in a batch of one rank.
        batches: Batches between two collections.
        round_size: Prompts that each rank rolls out at a time.
        validation: Folder or URL of held-out pair shards; none: no validation.
        resolution: Width and height of the held-out images.
        validation_pairs: How many held-out pairs are used at most; none: all.
        patience: Rounds without any pair on any rank after which the run stops.
        seed: Seed of the order and of the roll-outs.
    """

    def __init__(
        self,
        prompts: Prompts,
        batch_size: int,
        batches: int,
        round_size: int,
        validation: str | list[str] | None = None,
        resolution: int = 512,
        validation_pairs: int | None = None,
        patience: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "batches": batches, "round_size": round_size}
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"{name} is {number}; give at least 1.")
        self.prompts, self.batch_size, self.batches = prompts, batch_size, batches
        self.round_size, self.patience, self.seed = round_size, patience, seed
        self.used = 0  # prompts rolled out so far, over all ranks
        self.collected: Steps | None = None
        self._held_out = (
            PairShards(validation, batch_size, resolution, validation, workers=0)
            if validation is not None
            else None
        )
        if self._held_out is not None:
            self._held_out.validation_pairs = validation_pairs

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts, so that what is wrong with them is told at the start."""
        self.texts = self.prompts.texts()
        world = self.trainer.world_size if self.trainer else 1
        if len(self.texts) < world:
            raise InputError(
                f"{len(self.texts)} prompts do not suffice for {world} ranks: give more prompts."
            )
        self._order = Plan([len(self.texts)], self.seed)
        if self._held_out is not None:
            self._held_out.trainer = self.trainer
            self._held_out.setup("validate")

    def train_dataloader(self) -> Collected:
        """Return the epochs' batches."""
        return Collected(self)

    def val_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs."""
        return [] if self._held_out is None else self._held_out.val_dataloader()

    def test_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs, as for validation."""
        return self.val_dataloader()

    @property
    def run(self) -> Trainer:
        """The Trainer that this belongs to."""
        assert self.trainer is not None, "PromptCollections has no trainer yet: give it to one"
        return self.trainer

    # Collecting ---------------------------------------------------------------------------------

    def collect(self) -> Steps:
        """Return a shuffled epoch of this rank's pairs, made by the weights as they stand."""
        trainer, module = self.run, cast("OnPolicyModule", self.run.lightning_module)
        needed, rounds, empty = self.batches * self.batch_size, [], 0
        bar = tqdm(
            total=needed,
            desc="collecting pairs",
            leave=False,
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        )
        module.eval()
        have = torch.tensor(0.0, device=trainer.strategy.root_device)
        while self._least(have) < needed:
            with trainer.precision_plugin.forward_context():
                made = module.collect(*self._next_round())
            rounds.append(made)
            have += len(made.t)
            bar.update(min(len(made.t), needed - bar.n))
            empty = 0 if self._sum(torch.tensor(float(len(made.t)))) else empty + 1
            if empty >= self.patience:
                raise InputError(
                    f"{empty} rounds of {self.round_size} prompts gave no pair: lower the method's "
                    "`threshold`, or take a judge that tells its candidates apart."
                )
        module.train()
        bar.close()
        every = Steps.joined(rounds)
        order = torch.Generator().manual_seed(stable_seed("collection", self.seed, self.used))
        kept = torch.randperm(len(every.t), generator=order)[:needed]
        rank_zero_info(
            f"Collected {len(every.t)} pairs from {len(rounds) * self.round_size} prompts a rank."
        )
        return every.rows(kept)

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

    def _least(self, have: Tensor) -> float:
        return float(self.run.strategy.reduce(have.clone(), reduce_op="min"))

    def _sum(self, made: Tensor) -> float:
        made = made.to(self.run.strategy.root_device)
        return float(self.run.strategy.reduce(made, reduce_op="sum"))

    # Resuming -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, and write what it still has to learn from beside it."""
        progress: Any = self.run.fit_loop.epoch_loop.batch_progress
        amid = 0 < progress.current.processed < self.batches
        if amid and self.collected is not None:
            self._write()
        return {"used": self.used, "amid": amid, "world": self.run.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.used = state["used"]
        if not state["amid"]:
            return
        if state["world"] != self.run.world_size:
            raise InputError(
                f"The checkpoint was taken amid a collection of {state['world']} ranks: go on with "
                "as many, or from a checkpoint taken at the end of an epoch."
            )
        path = self._path()
        if not path.is_file():
            raise InputError(
                f"{path} is missing, from which the checkpoint goes on: name a later checkpoint."
            )
        device = self.run.strategy.root_device
        self.collected = Steps.of({k: v.to(device) for k, v in load_file(path).items()})

    def _path(self) -> Path:
        name = f"{self.used:09d}-rank{self.run.global_rank}.safetensors"
        return Path(self.run.default_root_dir) / BUFFERS / name

    def _write(self) -> None:
        path = self._path()
        if path.is_file():  # written once per collection
            return
        assert self.collected is not None
        tensors = self.collected.tensors().items()
        with whole_output(path) as temporary:
            save_file({name: value.contiguous().cpu() for name, value in tensors}, temporary)
        mine = sorted(path.parent.glob(f"*-rank{self.run.global_rank}.safetensors"))
        for old in mine[:-KEPT]:
            old.unlink()


class Collected:
    """The batches of an epoch: collected at the first one, inside the epoch.

    Not a DataLoader, so that Lightning puts no sampler around it: every rank has its own pairs.
    """

    def __init__(self, data: PromptCollections) -> None:
        self.data = data

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self.data.batches

    def __iter__(self) -> Iterator[Steps]:
        """Yield the batches from where the run stands."""
        data = self.data
        done = data.run.fit_loop.epoch_loop.batch_progress.current.ready
        if not done or data.collected is None:
            data.collected = data.collect()
        for batch in range(done, data.batches):
            start = batch * data.batch_size
            yield data.collected.rows(torch.arange(start, start + data.batch_size))

    def state_dict(self) -> dict[str, int]:
        """Return nothing but a guard: the data module knows the rest."""
        return {"batches": self.data.batches, "batch_size": self.data.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Refuse epochs of another length, in which the counters would mean another place."""
        if state != self.state_dict():
            raise InputError(
                f"The checkpoint was made with {state['batches']} batches of "
                f"{state['batch_size']} pairs a collection; give the same numbers to go on."
            )

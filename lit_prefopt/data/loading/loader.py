"""Data loaders: DataLoaders of whole batches that resume at the position of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_prefopt.data.loading.broken_samples import BrokenSamples
from lit_prefopt.data.loading.long_prompts import LongPromptCounter
from lit_prefopt.data.loading.worker import Batch, PairBatches, Stop, ignore_interrupts
from lit_prefopt.data.order.position import EpochPosition, EpochProgress, ResumePoint
from lit_prefopt.data.order.shaping import EnlargedCounter
from lit_prefopt.errors import InputError

log = logging.getLogger(__name__)


class PairLoader(DataLoader[Batch]):
    """DataLoader whose workers return whole batches.

    Args:
        batches: The batches of this rank.
        length: How many of them an epoch has.
        workers: Worker processes; 0 reads in the main process.
        pinned: Return pinned memory, from which batches are copied to a GPU without blocking.
    """

    def __init__(
        self, batches: PairBatches, length: int, workers: int = 0, *, pinned: bool = False
    ) -> None:
        super().__init__(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=ignore_interrupts,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=pinned,
        )
        self.batches, self.length = batches, length
        self.broken = BrokenSamples(batches.broken.share, batches.samples)
        self.enlarged: EnlargedCounter | None = None  # where the sizes are not known beforehand
        self.long_prompts: LongPromptCounter | None = None  # where a text encoder embeds them

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return self.length

    def remaining(self) -> EpochPosition:
        """Return the part of the epoch that is read next."""
        return EpochPosition(0, 0, self.length)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches from the current position to the end of the epoch."""
        remaining = self.remaining()
        self.batches.at[:] = torch.tensor(remaining)
        # range first: the other way round, zip takes one batch too many
        for number, batch in zip(range(remaining.batches), super().__iter__(), strict=False):
            if isinstance(batch, Stop):
                raise InputError(batch.reason)
            batch = self._counted(batch)
            if number + 1 == remaining.batches:
                self._warn()  # a small set has fewer samples than are waited for
            yield batch

    def _warn(self) -> None:
        if self.enlarged is not None:
            self.enlarged.warn()
        if self.long_prompts is not None:
            self.long_prompts.finish()

    def _counted(self, batch: Batch) -> Batch:
        if self.enlarged is not None and batch.frames is not None:
            self.enlarged.count(batch.frames)
        if self.long_prompts is not None:
            self.long_prompts.count(batch.texts)
        self.broken.read += len(batch.keys) + len(batch.broken)
        for name in batch.broken:
            if name not in self.broken.names:
                log.warning("A sample cannot be read and another one stands in: %s.", name)
            self.broken.add(name)
        return batch._replace(broken=tuple(batch.broken))  # pinning memory makes it a list


class ResumableLoader(PairLoader):
    """Loader that resumes at the position of a checkpoint, on any number of ranks.

    Args:
        batches: The batches of this rank.
        epoch_progress: Where the run stands.
        progress: Returns Lightning's counters of batches; None outside of a Trainer.
        workers: Worker processes; 0 reads in the main process.
        pinned: Return pinned memory, from which batches are copied to a GPU without blocking.
    """

    def __init__(
        self,
        batches: PairBatches,
        epoch_progress: EpochProgress,
        progress: Callable[[], Any] | None = None,
        workers: int = 0,
        *,
        pinned: bool = False,
    ) -> None:
        super().__init__(batches, epoch_progress.whole, workers, pinned=pinned)
        self.epoch_progress, self.progress = epoch_progress, progress

    def remaining(self) -> EpochPosition:
        """Return the rest of the epoch."""
        # processed, not ready: a batch that an interrupt cut short counts as not read
        return self.epoch_progress.position_after(
            self.progress().total.processed if self.progress else 0
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, counted in samples."""
        remaining = self.remaining()
        return {
            "samples": self.epoch_progress.samples,
            "order": self.batches.plan.fingerprint(),
            "epoch": remaining.epoch,
            "position": remaining.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a checkpoint's position, and convert Lightning's counts of batches."""
        same = "give the same shards, `seed`, `shards_per_block` and `min_side`, and with "
        same += "`aspect_buckets` the same sizes and `batch_size`, or start a new run"
        if state["samples"] != self.epoch_progress.samples:
            raise InputError(
                f"The checkpoint was made with {state['samples']} training samples, not with "
                f"{self.epoch_progress.samples}; {same}."
            )
        if state["order"] != self.batches.plan.fingerprint():
            raise InputError(f"The checkpoint was made with another order of the data; {same}.")
        if self.progress is None:
            return
        progress = self.progress()
        self.epoch_progress.resume_point = ResumePoint(
            progress.total.processed, state["epoch"], state["position"]
        )
        self._recount(progress)

    def _recount(self, progress: Any) -> None:
        """Turn Lightning's count of this epoch's batches into batches of our size."""
        current, position = progress.current, self.epoch_progress.resume_point.position
        if not current.processed:
            return
        # position 0 with batches processed: the checkpoint was taken at the end of its epoch
        done = self.epoch_progress.done(position) if position else self.epoch_progress.batches
        shift = done - current.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + shift)
        progress.is_last_batch |= done >= self.epoch_progress.batches


def _as_is(batch: Any) -> Any:
    return batch

"""Position in the data stream, for mid-epoch resume.

Lightning counts batches and expects the loader to start at the right one. The size of a global
batch depends on the number of ranks, so positions here count samples: a run stops at an epoch and
a position in its order, from which any number of ranks can resume.
"""

from __future__ import annotations

from typing import NamedTuple


class ResumePoint(NamedTuple):
    """A known point of a run: the processed batches at an epoch and position."""

    processed: int = 0
    epoch: int = 0
    position: int = 0  # samples of the epoch that were used


class EpochPosition(NamedTuple):
    """The remaining part of an epoch."""

    epoch: int
    position: int
    batches: int


class EpochProgress:
    """Progress of a run through its epochs.

    Args:
        samples: Samples of an epoch.
        global_batch: Samples of a batch over all ranks.
        limit: Trainer's limit_train_batches: a number of batches or a share of them.
    """

    def __init__(self, samples: int, global_batch: int, limit: float = 1.0) -> None:
        self.samples, self.global_batch = samples, global_batch
        self.whole = samples // global_batch
        self.batches = min(self.whole, limit) if isinstance(limit, int) else int(self.whole * limit)
        self.resume_point = ResumePoint()

    def done(self, position: int) -> int:
        """Return the number of batches of an epoch before a position.

        The remaining batches are counted from the end, since a position that was reached with
        another batch size need not be a multiple of this one.
        """
        return min(self.batches, self.whole - (self.samples - position) // self.global_batch)

    def position_after(self, processed: int) -> EpochPosition:
        """Return the position after a number of processed batches."""
        since = processed - self.resume_point.processed
        left = self.batches - self.done(self.resume_point.position)
        if since < left:
            position = self.resume_point.position + since * self.global_batch
            return EpochPosition(self.resume_point.epoch, position, left - since)
        epochs, batch = divmod(since - left, max(1, self.batches))
        position = batch * self.global_batch
        return EpochPosition(self.resume_point.epoch + 1 + epochs, position, self.batches - batch)

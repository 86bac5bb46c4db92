"""Where a run stands in its data, and how it goes on after a stop.

Lightning counts batches and trusts the loader to start at the right one. Batches are as large as
all ranks together make them, so what counts here is samples: the place at which a run stopped is
an epoch and a position in that epoch's order, whatever number of ranks goes on from there.
"""

from __future__ import annotations

from typing import NamedTuple


class ResumePoint(NamedTuple):
    """A known point of a run: so many batches had been processed when it stood there."""

    processed: int = 0
    epoch: int = 0
    position: int = 0  # samples of the epoch that were used


class EpochPosition(NamedTuple):
    """What is still to be read of an epoch."""

    epoch: int
    position: int
    batches: int


class EpochProgress:
    """The way of a run through its epochs.

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
        """Return how many batches of an epoch lie behind a position.

        What remains is counted from the end, since a position that was reached with other batches
        need not be a multiple of ours.
        """
        return min(self.batches, self.whole - (self.samples - position) // self.global_batch)

    def position_after(self, processed: int) -> EpochPosition:
        """Return where a run stands after so many batches."""
        since = processed - self.resume_point.processed
        left = self.batches - self.done(self.resume_point.position)
        if since < left:
            position = self.resume_point.position + since * self.global_batch
            return EpochPosition(self.resume_point.epoch, position, left - since)
        epochs, batch = divmod(since - left, max(1, self.batches))
        position = batch * self.global_batch
        return EpochPosition(self.resume_point.epoch + 1 + epochs, position, self.batches - batch)

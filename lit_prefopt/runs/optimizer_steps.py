"""Position of a run between two optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


def pending_batches(trainer: Trainer) -> int:
    """Return the number of batches since the last optimizer step.

    Their gradients exist only in memory: a checkpoint that counts these batches would lose them.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done: int = progress.current.processed
    whole = done >= trainer.num_training_batches  # the last batch of an epoch always steps
    ended = progress.is_last_batch and done == progress.current.ready
    return 0 if whole or ended else done % trainer.accumulate_grad_batches


@contextmanager
def counters_at_last_step(trainer: Trainer) -> Iterator[None]:
    """Reset the run's counters to the last optimizer step inside the block.

    Since then neither weights nor optimizer have changed, so a checkpoint taken here is exact; the
    later batches are repeated on resume.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    count, kept = pending_batches(trainer), progress.state_dict()
    progress.is_last_batch &= not count and progress.current.processed == progress.current.ready
    for counts in (progress.total, progress.current):
        counts.completed -= count
        counts.processed -= count
        counts.ready = counts.started = counts.processed  # a failed batch counts as not started
    try:
        yield
    finally:
        progress.load_state_dict(kept)

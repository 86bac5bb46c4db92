"""Where a run stands between two optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


def pending_batches(trainer: Trainer) -> int:
    """Return how many batches were trained on since the last optimizer step.

    Their gradients live nowhere but in memory: a checkpoint that counts them would lose them.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done: int = progress.current.processed
    whole = done >= trainer.num_training_batches  # the last batch of an epoch always steps
    ended = progress.is_last_batch and done == progress.current.ready
    return 0 if whole or ended else done % trainer.accumulate_grad_batches


@contextmanager
def counters_at_last_step(trainer: Trainer) -> Iterator[None]:
    """Let the run's counters stand right after the last optimizer step inside the block.

    Since then neither weights nor optimizer have changed, so a checkpoint taken here is exact; the
    batches behind it are trained on once more.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    count, kept = pending_batches(trainer), progress.state_dict()
    progress.is_last_batch &= not count and progress.current.processed == progress.current.ready
    for counts in (progress.total, progress.current):
        counts.completed -= count
        counts.processed -= count
        counts.ready = counts.started = counts.processed  # nor is a batch that failed begun
    try:
        yield
    finally:
        progress.load_state_dict(kept)

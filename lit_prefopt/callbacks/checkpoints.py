"""Checkpoints for exact resume, with a `last.ckpt` that is always the last state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prefopt.errors import InputError
from lit_prefopt.runs.checkpoint_files import AtomicCheckpointIO
from lit_prefopt.runs.optimizer_steps import counters_at_last_step, pending_batches
from lit_prefopt.utils.atomic_files import remove_temporaries


class Checkpoints(ModelCheckpoint):
    """ModelCheckpoint that saves right after optimizer steps and writes files atomically.

    - A checkpoint that falls due while gradients are being accumulated (`train_time_interval`, a
      validation that does not fall on a step, the end of `max_time`) waits for the optimizer step:
      no checkpoint contains accumulated gradients.
    - The state at the end of training is saved too. Lightning saves it only if nothing was saved
      before: of 2,400 steps with a checkpoint every 500, `last.ckpt` would hold step 2,000.
    - A file gets its name once it is on the disk. Temporary files of a killed run are removed.
    """

    _validated = False
    _stopping = False
    _torn = False  # between the beginning of an optimizer step and the end of what follows it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove a killed run's temporary files, and write checkpoints atomically."""
        # A run has a directory of its own: checkpoints of the same name are replaced.
        self._enable_version_counter = False
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and Path(str(self.dirpath)).is_dir():
            remove_temporaries(Path(str(self.dirpath)), "*.ckpt")
        # sharding strategies write their own folders
        if type(trainer.strategy._checkpoint_io) in (TorchCheckpointIO, type(None)):
            trainer.strategy._checkpoint_io = AtomicCheckpointIO()

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Mark the state as inconsistent until the end of the batch."""
        self._torn = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save a due checkpoint, if this batch ended in an optimizer step."""
        self._torn = False
        if pending_batches(trainer):
            self._hold(trainer)
            return
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._validated:
            self._validated = False
            super().on_validation_end(trainer, pl_module)
        trainer.should_stop |= self._stopping

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a due checkpoint, now or at the next optimizer step."""
        if trainer.state.fn == "fit" and pending_batches(trainer):
            self._validated = True
            self._hold(trainer)
            return
        super().on_validation_end(trainer, pl_module)

    def _hold(self, trainer: Trainer) -> None:
        """Delay a stop until the next optimizer step."""
        self._stopping |= trainer.should_stop
        trainer.should_stop = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last optimizer step, if `save_on_exception` is set."""
        if trainer.state.fn != "fit" or self._torn or isinstance(exception, InputError):
            return
        with counters_at_last_step(trainer):
            super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state if it was not saved yet."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

"""Checkpoints whose `last.ckpt` is what its name says."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves the state at the end of training.

    Lightning saves at the end only if nothing was saved before: of 2,400 steps with a checkpoint
    every 500, `last.ckpt` would hold step 2,000.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state if it is not saved yet."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

"""Check before training that the disk has space for the checkpoints."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prefopt.estimate.memory import footprint
from lit_prefopt.learner import Learner
from lit_prefopt.utils.output_lock import check_free_space


class DiskSpace(Callback):
    """Stops a run before its first step if the disk cannot hold its checkpoints.

    The estimate is low: the trained weights and the optimizer's states, twice, since a new
    checkpoint is complete before the earlier one is removed. The command line adds it to every
    `fit`.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder of each checkpoint callback (rank zero)."""
        if not trainer.is_global_zero or not isinstance(pl_module, Learner):
            return
        parts = footprint(pl_module)
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
                continue
            states = 0 if callback.save_weights_only else parts.states
            folder = Path(callback.dirpath)
            copies = 1 if any(folder.glob("*.ckpt")) else 2
            check_free_space(folder, copies * (parts.trained + states), "its checkpoints need")

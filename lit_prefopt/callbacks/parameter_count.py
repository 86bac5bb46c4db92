"""Log how many parameters are trained, and where, in one line."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count


class ParameterCount(ModelSummary):
    """Logs the number of trained parameters and the device, in place of Lightning's table.

    Lightning's table has one row for the whole backbone, and FLOPs that are zero.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log one line (rank zero)."""
        summary = self._summary(trainer, pl_module)
        trained, total = (
            get_human_readable_count(count)
            for count in (summary.trainable_parameters, summary.total_parameters)
        )
        ranks = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
        rank_zero_info(
            f"Training {trained} of {total} parameters ({summary.model_size:.1f} MB) on "
            f"{ranks}{trainer.strategy.root_device.type}."
        )

"""The progress bar of runs that are bounded by steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's progress bar with three fixes.

    Lightning writes `Epoch 7/-2` into the bar of a run without `max_epochs`, and reads the numbers
    that it shows from the device after every batch, which synchronizes. Here they are read
    only after each logged step, and the logger's version is left out.
    """

    SHOWN = ("train/loss", "train/accuracy")

    _shown: dict[str, Any]
    _read_at = -1
    _amid = False  # between two batches of an epoch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the last step's metrics, when the device was just synchronized anyway."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._read_at < 0 or (every and step % every == 0 and step != self._read_at):
            self._read_at, self._shown = step, self.get_metrics(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar."""
        self._amid = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._amid = False

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics shown beside the bar."""
        if self._amid:
            return self._shown
        logged = trainer.callback_metrics
        numbers = {name: float(logged[name]) for name in self.SHOWN if name in logged}
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)  # the folder of the logs
        return {**others, **numbers}

    def _get_train_description(self, current_epoch: int) -> str:
        text: str = super()._get_train_description(current_epoch)
        last = self.trainer.max_epochs
        return text.replace(f"/{last - 1}", "", 1) if last is not None and last < 0 else text

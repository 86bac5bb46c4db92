"""The progress bar of runs that are bounded by steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar without the last epoch's number where there is none.

    Lightning writes `Epoch 7/-2` into the bar of a run without `max_epochs`.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        text: str = super()._get_train_description(current_epoch)
        last = self.trainer.max_epochs
        return text.replace(f"/{last - 1}", "", 1) if last is not None and last < 0 else text

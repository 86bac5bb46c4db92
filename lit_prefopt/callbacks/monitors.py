"""Check that metrics which callbacks monitor are logged."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_prefopt.errors import InputError

MOST = 60  # characters of a quoted name


class Monitors(Callback):
    """Checks the metrics of EarlyStopping and ModelCheckpoint before these look for them.

    The command line adds it to every run. Only a run's first validation shows which metrics there
    are, since methods and callbacks log their own.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is monitored after each validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            stops = isinstance(one, EarlyStopping) and not one._check_on_train_epoch_end
            # training metrics may come later, and a checkpoint waits for them
            saves = isinstance(one, ModelCheckpoint) and not str(one.monitor).startswith("train/")
            if (stops and one.strict) or saves:
                _check(trainer, one)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is monitored at the end of each epoch."""
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(one, EarlyStopping) and one._check_on_train_epoch_end and one.strict:
                _check(trainer, one)


def _check(trainer: Trainer, callback: EarlyStopping | ModelCheckpoint) -> None:
    known = trainer.callback_metrics
    if callback.monitor is None or callback.monitor in (*known, "epoch", "step"):
        return
    raise InputError(
        f"{type(callback).__name__} monitors {callback.monitor[:MOST]!r}, which is not logged: set "
        f"its `monitor` to one of {', '.join(sorted(known))}."
    )

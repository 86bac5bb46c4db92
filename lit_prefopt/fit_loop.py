"""Fit loop of runs that are resumed at their end, or at a validation that was not finished."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop


class FitLoop(_FitLoop):
    """Lightning's fit loop, with the hooks and the validation that it leaves out after a resume.

    If a resumed run has no batch left, Lightning skips `on_train_start` and `on_train_end`: then
    averaged weights are not swapped in for export and evaluation, sharded ones are not gathered,
    and signals are not handled. A validation that is due at a checkpoint's step but was not
    finished (the checkpoint is older, or the validation was interrupted) is skipped as well.
    """

    validated_at = -1  # optimizer step of the last complete validation
    validation_due = False  # at the step of the checkpoint that the run is resumed from
    resumed = False

    def run(self) -> None:
        """Train, or only call the hooks if a resumed run has no batch left."""
        self.setup_data()
        if not (self.resumed and self.skip):
            super().run()
            return
        self.on_run_start()
        self.on_iteration_done()  # it is not restarting any more
        self.on_run_end()

    def on_run_start(self) -> None:
        """Call the hooks of the start, and repeat a validation that was not finished."""
        super().on_run_start()
        if self.resumed and self.validation_due and self.trainer.enable_validation:
            self._validate()
        self.resumed = self.validation_due = False

    def _validate(self) -> None:
        """Run a whole validation, as between two batches."""
        trainer, loop = self.trainer, self.epoch_loop.val_loop
        connector = trainer._logger_connector
        trainer.validating, first = True, connector._first_loop_iter
        loop.restarting = False  # from its first batch
        loop.run()
        loop._has_run = False  # of the next batch
        trainer.training, connector._first_loop_iter = True, first

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Return the loop's state, with whether a validation is due now."""
        state: dict[str, Any] = super().on_save_checkpoint()
        fetcher = self._data_fetcher
        due = (
            fetcher is not None
            and self.validated_at != self.trainer.global_step
            and self.epoch_loop._should_check_val_fx(fetcher)
        )
        return {**state, "validated_at": self.validated_at, "validation_due": due}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Restore the loop's state."""
        super().on_load_checkpoint(state_dict)
        self.resumed = True
        self.validated_at = state_dict.get("validated_at", -1)
        self.validation_due = state_dict.get("validation_due", False)


def use_fit_loop(trainer: Trainer) -> None:
    """Replace Lightning's fit loop in a trainer that has not started yet.

    Args:
        trainer: The trainer.
    """
    old = trainer.fit_loop
    if not isinstance(old, FitLoop):
        loop = FitLoop(trainer, old.min_epochs, old.max_epochs)
        vars(loop).update(vars(old))
        trainer.fit_loop = loop


def note_validation(trainer: Trainer) -> None:
    """Record that the validation of the current optimizer step is complete.

    Args:
        trainer: The trainer.
    """
    if isinstance(trainer.fit_loop, FitLoop):
        trainer.fit_loop.validated_at = trainer.global_step

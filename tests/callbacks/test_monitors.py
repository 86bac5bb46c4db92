"""EarlyStopping and ModelCheckpoint on metrics that are logged, and on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_prefopt.cli import main
from tests.helpers.runs import scalars


def monitoring(callback: str, name: str) -> list[str]:
    """Return the arguments of a callback that monitors a metric."""
    return ["--trainer.callbacks+", callback, "--trainer.callbacks.monitor", name]


def test_the_held_out_loss_is_logged_and_can_be_monitored(
    recipe: list[str], tmp_path: Path
) -> None:
    """Without a learning rate the policy is its own reference, and the loss is ln 2."""
    callbacks = [*monitoring("EarlyStopping", "val/loss"), "--trainer.callbacks.patience", "1"]
    main(["fit", *recipe, *callbacks, "--model.optimizer.lr", "0", "--trainer.max_steps", "20"])
    losses = scalars(tmp_path / "run")["val/loss"]
    assert losses == pytest.approx([0.693147, 0.693147])  # stopped after the second validation


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_is_not_logged_is_named_with_those_that_are(
    callback: str, recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *recipe, *monitoring(callback, "val/acuracy" * 20)])
    message = str(stop.value.code)
    assert message.startswith(f"lit-prefopt: {callback} monitors 'val/acuracy")
    assert "val/accuracy, " in message
    assert "val/loss" in message
    assert "val/acuracy" * 6 not in message  # quoted values are bounded


def test_a_training_metric_is_checked_at_the_end_of_the_epoch(recipe: list[str]) -> None:
    more = [*monitoring("EarlyStopping", "train/los"), "--trainer.max_steps", "7"]
    more += ["--trainer.callbacks.check_on_train_epoch_end", "true"]
    with pytest.raises(SystemExit, match=r"monitors 'train/los', .* train/loss"):
        main(["fit", *recipe, *more, "--trainer.limit_val_batches", "0"])

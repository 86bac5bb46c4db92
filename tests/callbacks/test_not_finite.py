"""A run whose loss, gradient or weights are not finite stops; its good checkpoints stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.backbones import trained
from lit_prefopt.cli import main


class Spoil(Callback):
    """Makes the loss, the gradients or the weights of one step NaN.

    Args:
        what: Which of them.
        step: The step, from 1.
    """

    def __init__(self, what: str, step: int = 3) -> None:
        self.what, self.step = what, step

    def _now(self, trainer: Trainer, what: str) -> bool:
        return self.what == what and trainer.global_step + 1 == self.step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._now(trainer, "loss"):
            batch.weights.fill_(math.nan)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._now(trainer, "gradient"):
            for parameter in trained(pl_module).values():
                parameter.grad = torch.full_like(parameter, math.nan)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "weights":
            next(iter(trained(pl_module).values())).fill_(math.inf)


def spoilt(recipe: list[str], what: str, **options: Any) -> list[str]:
    arguments = [*recipe, "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.callbacks+", "tests.callbacks.test_not_finite.Spoil"]
    for name, value in {"what": what, **options}.items():
        arguments += [f"--trainer.callbacks.{name}", str(value)]
    arguments += ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"]
    return [*arguments, "--trainer.callbacks.every_n_train_steps", "1"]


def last_step(run: Path) -> int:
    """Return the step of the last checkpoint, whose weights and moments are finite."""
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())
    for moments in last["optimizer_states"][0]["state"].values():
        assert all(moment.isfinite().all() for moment in moments.values())
    return int(last["global_step"])


def test_a_loss_that_is_not_finite_stops_the_run(recipe: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"Step 3: the loss is not finite; .*--ckpt_path last"
    ) as e:
        main(["fit", *spoilt(recipe, "loss")])
    assert isinstance(e.value.code, str)  # printed, with the exit code 1
    assert last_step(tmp_path / "run") == 2
    assert not (tmp_path / "run" / "weights").exists()
    main(["fit", *recipe, "--ckpt_path", "last"])
    assert (tmp_path / "run" / "weights").exists()


def test_a_gradient_that_is_not_finite_replaces_no_checkpoint(
    recipe: list[str], tmp_path: Path
) -> None:
    with pytest.raises(
        SystemExit, match=r"The checkpoint of step 3 was not written, because state"
    ):
        main(["fit", *spoilt(recipe, "gradient")])
    assert last_step(tmp_path / "run") == 2


@pytest.mark.parametrize("every", [0, 100])
def test_the_last_step_is_checked_where_nothing_was_logged(
    recipe: list[str], tmp_path: Path, every: int
) -> None:
    seldom = ["--trainer.log_every_n_steps", str(every), "--trainer.callbacks=[]"]
    with pytest.raises(SystemExit, match=r"Step 4: the loss is not finite"):
        main(
            ["fit", *recipe, *seldom, *spoilt([], "loss", step=4)[:-6], "--trainer.logger", "false"]
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_not_finite_are_not_exported(recipe: list[str], tmp_path: Path) -> None:
    arguments = spoilt(recipe, "weights")[:-6]
    arguments += ["--trainer.callbacks+", "ExportWeights", "--trainer.callbacks.folder", "second"]
    with pytest.raises(SystemExit, match=r"not exported, because backbone\..* is not finite"):
        main(["fit", *arguments])
    assert not (tmp_path / "run" / "second").exists()


def test_a_guard_that_leaves_the_step_out_goes_on(recipe: list[str], tmp_path: Path) -> None:
    guard = ["--trainer.callbacks+", "Guard", "--trainer.callbacks.on_spike", "skip"]
    with pytest.warns(UserWarning, match="Step 3: the loss is nan .*this step is skipped"):
        main(["fit", *spoilt(recipe, "loss"), *guard])
    assert last_step(tmp_path / "run") == 4

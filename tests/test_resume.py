"""A resumed run follows the recipe that it is given, and makes up for what was cut off."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch.optim import Optimizer

from lit_prefopt.cli import main
from tests.callbacks.test_interrupts import at
from tests.helpers.recipes import small_recipe
from tests.helpers.runs import assert_same_end, folder_of, same, scalars
from tests.helpers.tiny_toy_flow import flow_twin

OPTIMIZER = "--model.optimizer"
RATES: list[float] = []


class Rates(Callback):
    """Notes the learning rate of every optimizer step."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        RATES.append(optimizer.param_groups[0]["lr"])


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def settings(**values: object) -> list[str]:
    return [f"{OPTIMIZER}.{name}={value}" for name, value in values.items()]


def test_the_recipes_settings_hold_and_the_moments_are_kept(
    recipe: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = [*recipe, "--trainer.limit_val_batches", "0"]
    constant = settings(schedule="constant", warmup_steps=0)
    main(["fit", *recipe, *constant, *settings(lr=1e-3), "--trainer.max_steps", "2"])
    before = last(run)
    other = settings(lr=0, weight_decay=0.5, betas="[0.5,0.6]")
    main(["fit", *recipe, *constant, *other, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    after = last(run)
    assert same(before["state_dict"], after["state_dict"])  # the learning rate is 0 at once
    [group] = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0, 0.5, (0.5, 0.6))
    moments = [state["optimizer_states"][0]["state"] for state in (before, after)]
    assert {float(state["step"]) for state in moments[1].values()} == {3}
    # the second moment keeps 0.6 of what it was, so no element falls below that
    assert all(
        (moments[1][key]["exp_avg_sq"] >= 0.6 * moments[0][key]["exp_avg_sq"] - 1e-12).all()
        for key in moments[0]
    )


def test_the_recipes_schedule_holds_from_the_resumed_step_on(
    recipe: list[str], tmp_path: Path
) -> None:
    recipe = [*recipe, "--trainer.limit_val_batches", "0"]
    recipe += ["--trainer.callbacks+", "tests.test_resume.Rates"]
    warm = settings(schedule="constant_with_warmup")
    RATES.clear()
    first = settings(lr=1e-3, warmup_steps=4)
    main(["fit", *recipe, *warm, *first, "--trainer.max_steps", "2"])
    second = settings(lr=2e-3, warmup_steps=10)
    main(["fit", *recipe, *warm, *second, "--trainer.max_steps", "4", "--ckpt_path", "last"])
    assert pytest.approx([0, 0.25e-3, 0.4e-3, 0.6e-3]) == RATES


@pytest.mark.parametrize("name", ["Adafactor", "AdamW8bit"])
def test_another_optimizer_starts_with_moments_of_its_own(
    recipe: list[str], tmp_path: Path, name: str
) -> None:
    recipe = [*recipe, "--trainer.limit_val_batches", "0"]
    main(["fit", *recipe, "--trainer.max_steps", "2"])
    before = last(tmp_path / "run")
    arguments = [*recipe, OPTIMIZER, name, *settings(lr=1e-3), "--ckpt_path", "last"]
    with pytest.warns(
        UserWarning, match=rf"{name}, cannot use the moments of .* AdamW: they start"
    ):
        main(["fit", *arguments, "--trainer.max_steps", "3"])
    after = last(tmp_path / "run")
    assert after["global_step"] == 3
    assert not same(before["state_dict"], after["state_dict"])
    assert {int(state["step"]) for state in after["optimizer_states"][0]["state"].values()} == {1}
    main(["fit", *arguments, "--trainer.max_steps", "4"])  # its own moments are kept again
    states = last(tmp_path / "run")["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {2}


class FailInValidation(Callback):
    """Fails in the validation after a step, before its first batch."""

    step = 2

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            raise KeyError("a failure")


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def short(exact: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that ends after step 2, batch 6, with a validation."""
    arguments = [*exact, "--trainer.max_steps", "2"]
    arguments += ["--trainer.default_root_dir", str(tmp_path_factory.mktemp("short"))]
    main(["fit", *arguments])
    return arguments


@pytest.mark.parametrize("stopped", ["signal", "failure", "finished"])
def test_a_run_resumed_at_its_end_validates_and_exports_its_average(
    short: list[str], tmp_path: Path, stopped: str
) -> None:
    whole = Path(short[-1])
    arguments = [*short[:-1], str(tmp_path)]
    if stopped == "failure":
        failing = ["--trainer.callbacks+", "tests.test_resume.FailInValidation"]
        failing += ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"]
        failing += ["--trainer.callbacks.every_n_train_steps", "1"]
        with pytest.raises(KeyError, match="a failure"):
            main(["fit", *arguments, *failing])
    elif stopped == "signal":  # in the validation, and in the one that makes up for it
        for resume in ([], ["--ckpt_path", "last"]):
            with pytest.raises(SystemExit) as stop:
                main(["fit", *arguments, *at(signal.SIGTERM, 5, validation=True), *resume])
            assert stop.value.code == 143
    else:
        main(["fit", *arguments])
    assert last(tmp_path)["global_step"] == 2
    main(["fit", *arguments, "--ckpt_path", "last"])
    assert_same_end(whole, tmp_path)
    assert same(exported(whole), exported(tmp_path))
    assert not same(last(whole)["running_state"], last(whole)["state_dict"])
    assert scalars(tmp_path)["val/accuracy"] == scalars(whole)["val/accuracy"]


def test_a_validation_that_was_cut_off_is_made_up_for(exact: list[str], tmp_path: Path) -> None:
    """After step 2, batch 6; whether it was cut off before its first batch or within."""
    arguments = [*exact, "--trainer.default_root_dir", str(tmp_path)]
    resume: list[str] = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["fit", *arguments, *at(signal.SIGTERM, 5, validation=True), *resume])
        resume = ["--ckpt_path", "last"]
    assert last(tmp_path)["global_step"] == 2
    main(["fit", *arguments, *resume])
    assert_same_end(folder_of(exact), tmp_path)
    for name in ("val/accuracy", "val/margin"):
        assert scalars(tmp_path)[name] == scalars(folder_of(exact))[name]


def test_flow_dpo_stopped_within_an_epoch_ends_in_the_same_weights(
    toy_flow_folder: str, shards: str, tmp_path: Path
) -> None:
    """Two steps of two batches each, of an epoch of six batches; stopped after the first."""
    recipe = small_recipe(toy_flow_folder, shards, tmp_path, "toy-flow-diffusion-dpo")
    recipe += [*flow_twin(toy_flow_folder), "--trainer.max_steps", "2"]
    recipe += ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_val_batches", "0"]
    recipe += settings(lr=1e-5, warmup_steps=0)
    whole, parts = (["--trainer.default_root_dir", str(tmp_path / n)] for n in ("whole", "parts"))
    main(["fit", *recipe, *whole])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *recipe, *parts, *at(signal.SIGTERM, 0)])
    assert stop.value.code == 143
    assert last(tmp_path / "parts")["global_step"] == 1
    main(["fit", *recipe, *parts, "--ckpt_path", "last"])
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    logged = [scalars(tmp_path / name)["train/loss"] for name in ("whole", "parts")]
    assert logged[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged[0][-1] == logged[1][-1] < 0.5  # the mean of both batches of the resumed step

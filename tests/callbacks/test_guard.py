"""The guard in real runs: a spike or NaN is provoked, and a healthy run gives no alarm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.backbones import trained
from lit_prefopt.callbacks.spike_detection import (
    ErrorTrend,
    RunningMedian,
    SpikeDetector,
    StepStatistics,
)
from lit_prefopt.cli import main
from tests.helpers.runs import TWO_RANKS, assert_same_end, same, start

WEIGHTS: dict[int, dict[str, torch.Tensor]] = {}


class Poison(Callback):
    """Spoils the gradient of a step, and notes the weights after every one.

    Args:
        step: The first step whose gradient is spoilt, from 1.
        factor: What it is multiplied by.
        steps: How many are spoilt.
        rank: The only rank that spoils; none: all.
    """

    def __init__(
        self, step: int, factor: float = math.nan, steps: int = 1, rank: int | None = None
    ) -> None:
        self.spoilt, self.factor, self.rank = range(step, step + steps), factor, rank

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.spoilt and self.rank in (None, trainer.global_rank):
            for parameter in trained(pl_module).values():
                if parameter.grad is not None:
                    parameter.grad *= self.factor

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weights = {name: p.detach().clone() for name, p in trained(pl_module).items()}
        WEIGHTS[trainer.global_step] = weights


def guarded(recipe: list[str], on_spike: str, **poison: float) -> list[str]:
    """Return the arguments of eight steps with a guard, and with a poison before it."""
    arguments = [*recipe, "--trainer.max_steps", "8", "--trainer.val_check_interval", "1000"]
    arguments += ["--trainer.callbacks+", "tests.callbacks.test_guard.Poison"]
    for name, value in poison.items():
        text = ".nan" if math.isnan(value) else str(value)  # as YAML writes it
        arguments += [f"--trainer.callbacks.{name}", text]
    arguments += ["--trainer.callbacks+", "Guard", "--trainer.callbacks.window", "4"]
    arguments += ["--trainer.callbacks.on_spike", on_spike, "--trainer.callbacks.every", "1"]
    arguments += ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.filename", "{step}"]
    arguments += ["--trainer.callbacks.every_n_train_steps", "2"]
    arguments += ["--data.batch_size", "2"]
    return [*arguments, "--trainer.callbacks.save_last", "true"]


ACCUMULATE = ["--trainer.accumulate_grad_batches", "2"]


def test_warn_says_what_was_seen_and_goes_on(recipe: list[str]) -> None:
    with pytest.warns(UserWarning, match="Step 6: the gradient norm jumps to .* lower lear"):
        main(["fit", *guarded(recipe, "warn", step=6, factor=1e6)])
    assert not same(WEIGHTS[5], WEIGHTS[6])


@pytest.mark.parametrize("factor", [pytest.param(math.nan, marks=pytest.mark.slow), 1e6])
def test_skip_leaves_the_step_out(recipe: list[str], factor: float) -> None:
    arguments = [*guarded(recipe, "skip", step=6, factor=factor), *ACCUMULATE]
    with pytest.warns(UserWarning, match="Step 6: .*this step is skipped"):
        main(["fit", *arguments])
    assert same(WEIGHTS[5], WEIGHTS[6])
    assert not same(WEIGHTS[6], WEIGHTS[7])
    assert all(weight.isfinite().all() for weight in WEIGHTS[8].values())


@pytest.mark.slow
def test_a_run_that_only_skips_is_stopped(recipe: list[str], tmp_path: Path) -> None:
    arguments = guarded(recipe, "skip", step=3, steps=6)
    at = arguments.index("--trainer.callbacks.window")
    arguments[at:at] = ["--trainer.callbacks.most", "4"]
    with pytest.raises(SystemExit, match="Step 7: the loss is .* gradient norm nan"):
        main(["fit", *arguments])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_rewind_goes_back_to_the_last_checkpoint_and_on(recipe: list[str]) -> None:
    average = ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
    with pytest.warns(UserWarning, match="Step 6: .* is rewound to the weights of .*last.ckpt"):
        main(["fit", *guarded(recipe, "rewind", step=6), *average, *ACCUMULATE])
    assert same(WEIGHTS[4], WEIGHTS[6])
    assert not same(WEIGHTS[5], WEIGHTS[6])
    assert not same(WEIGHTS[6], WEIGHTS[7])


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_step(recipe: list[str], tmp_path: Path) -> None:
    """The second rank alone sees a spoilt gradient; the first says what both do."""
    arguments = [*guarded(recipe, "skip", step=3, rank=1), "--trainer.max_steps", "4"]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = start(arguments, command=TWO_RANKS)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert said.count("Step 3: the loss is") == 1
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["callbacks"]["Guard"]["skipped"] == 0  # in a row: step 4 was taken again
    [states] = [state["state"] for state in last["optimizer_states"]]
    assert {int(state["step"]) for state in states.values()} == {3}


@pytest.mark.slow
def test_a_run_resumed_after_a_rewind_goes_on_exactly(recipe: list[str], tmp_path: Path) -> None:
    whole, parts = (["--trainer.default_root_dir", str(tmp_path / n)] for n in ("whole", "parts"))
    average = ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
    arguments = [*guarded(recipe, "rewind", step=3), *average]
    main(["fit", *arguments, *whole])
    main(["fit", *arguments, *parts, "--trainer.max_steps", "5"])
    main(["fit", *arguments, *parts, "--ckpt_path", "last"])
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert a["callbacks"]["Guard"]["rewound"] == 1
    assert a["callbacks"]["Guard"] == b["callbacks"]["Guard"]


def test_stop_ends_the_run_with_a_sentence(recipe: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Step 3: .*bf16-mixed.* resume with `--ckpt_path last`"):
        main(["fit", *guarded(recipe, "stop", step=3)])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_noticed(recipe: list[str]) -> None:
    arguments = guarded(recipe, "stop", step=100)
    with pytest.raises(SystemExit, match="Step .* (jumps|is)"):
        main(["fit", *arguments, "--model.optimizer.lr", "10", "--trainer.max_steps", "20"])


@pytest.mark.slow
def test_a_healthy_run_gives_no_alarm(recipe: list[str], recwarn: pytest.WarningsRecorder) -> None:
    arguments = [*guarded(recipe, "warn", step=100), "--data.batch_size", "4"]
    arguments[arguments.index("--trainer.callbacks.window") + 1] = "12"
    main(["fit", *arguments, "--trainer.max_steps", "30"])
    assert not [w for w in recwarn if "Step " in str(w.message)]


def step(number: int, loss: float = 0.7, gradient: float = 1.0) -> StepStatistics:
    return StepStatistics(number, loss, -1.0, -1.0, gradient)


def test_level_by_hand() -> None:
    level = RunningMedian(window=5)
    for value in (1.0, 2.0, 3.0, 4.0, 100.0):  # median 3, median absolute deviation 1
        assert level.excess(50.0) == 0
        level.values.append(value)
    assert level.excess(3 + 2 * 1.4826) == pytest.approx(2)
    assert level.excess(-100.0) < 0


def test_overflows_of_a_gradient_scaler_are_no_alarm_unless_they_go_on() -> None:
    watch = SpikeDetector(threshold=10, window=3)
    seen = [watch.spike(step(i, gradient=math.inf), scaled=True) for i in range(25)]
    assert seen[:19] == [None] * 19
    assert "gradient norm inf" in str(seen[19])
    assert watch.spike(step(1, loss=math.nan), scaled=True) is not None
    assert watch.spike(step(1, gradient=math.inf)) is not None


@pytest.mark.parametrize("reference", [1.0, -1.0])
def test_a_rising_chosen_error_is_told_from_noise(reference: float) -> None:
    rise = ErrorTrend(window=50)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).mul(0.2).tolist()
    for value in noise[:100]:
        rise.add(1 + value, reference + value if reference >= 0 else reference)
    assert rise.share() == 0
    for value in noise[100:]:
        rise.add(1.5 + value, reference + value if reference >= 0 else reference)
    assert rise.share() == pytest.approx(0.5, abs=0.1)

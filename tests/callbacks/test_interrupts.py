"""Ctrl-C and SIGTERM: the run stops right after an optimizer step and goes on exactly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.cli import main
from tests.helpers.runs import (
    TWO_RANKS,
    assert_same_end,
    finished,
    folder_of,
    ranks_of,
    start,
    wait_for,
)


class SignalAt(Callback):
    """Sends a signal to its own process, in a batch or in a validation.

    Args:
        signum: The signal.
        batch: Number of the batch.
        validation: Whether it comes in the validation after that batch.
    """

    def __init__(self, signum: int, batch: int, validation: bool = False) -> None:
        self.signum, self.batch, self.validation = signum, batch, validation

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and not self.validation:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and self.validation:
            os.kill(os.getpid(), self.signum)


def at(signum: int, batch: int, validation: bool = False) -> list[str]:
    options = {"signum": int(signum), "batch": batch, "validation": str(validation).lower()}
    arguments = ["--trainer.callbacks+", "tests.callbacks.test_interrupts.SignalAt"]
    return arguments + [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("stop", [[], at(signal.SIGTERM, 1)], ids=["to the end", "interrupted"])
def test_signals_are_given_back(recipe: list[str], stop: list[str]) -> None:
    """Neither our handlers nor Lightning's outlive the run."""
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    if stop:
        with pytest.raises(SystemExit):
            main(["fit", *recipe, *stop])
    else:
        main(["fit", *recipe])
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("stops", "codes", "steps"),
    [
        # at the beginning of a step's batches, and at the last one of an epoch
        ([at(signal.SIGINT, 3), at(signal.SIGTERM, 7)], [130, 143], [2, 3]),
        # in the midst of them, and in a validation
        pytest.param(
            [at(signal.SIGTERM, 1), at(signal.SIGTERM, 5, validation=True)],
            [143, 143],
            [1, 2],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_exactly(
    exact: list[str], stops: list[list[str]], codes: list[int], steps: list[int], tmp_path: Path
) -> None:
    arguments = [*exact, "--trainer.default_root_dir", str(tmp_path)]
    resume: list[str] = []
    for stop, code, step in zip(stops, codes, steps, strict=True):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *arguments, *stop, *resume])
        assert stopped.value.code == code
        last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == step
        assert not (tmp_path / "weights").exists()
        resume = ["--ckpt_path", "last"]
    main(["fit", *arguments, *resume])
    assert_same_end(folder_of(exact), tmp_path)


def test_without_time_for_the_step_the_one_before_is_saved(
    exact: list[str], tmp_path: Path
) -> None:
    arguments = [*exact, "--trainer.default_root_dir", str(tmp_path)]
    hurry = ["--trainer.callbacks+", "Interrupts", "--trainer.callbacks.grace", "-1"]
    resume: list[str] = []
    for batch, step in ((1, 0), (9, 3)):  # in the very first step, and in the last one
        with pytest.raises(SystemExit):
            main(["fit", *arguments, *hurry, *at(signal.SIGTERM, batch), *resume])
        last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == step
        resume = ["--ckpt_path", "last"]
    main(["fit", *arguments, *resume])
    assert_same_end(folder_of(exact), tmp_path)


def test_ctrl_c_outside_of_a_training_ends_with_130(recipe: list[str]) -> None:
    # a shell starts its background jobs with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = at(signal.SIGINT, -1, validation=True)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["validate", *recipe, *stop])
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert stopped.value.code == 130


def slowly(beat: Path, pause: float) -> list[str]:
    arguments = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
    arguments += ["--trainer.callbacks.path", str(beat)]
    return [*arguments, "--trainer.callbacks.pause", str(pause)]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_job(
    exact: list[str], signum: int, code: int, tmp_path: Path
) -> None:
    """As a terminal and a cluster send it: the workers get it as well."""
    parts = tmp_path / "parts"
    arguments = [*exact, "--data.workers", "2", "--trainer.default_root_dir", str(parts)]
    process = start([*arguments, *slowly(tmp_path / "beat", 0.3)], start_new_session=True)
    wait_for(tmp_path / "beat", "batch 4", process)
    os.killpg(process.pid, signum)
    said = finished(process)
    assert process.returncode == code, said
    assert "after step 2: the state is saved in" in said
    assert "--ckpt_path last" in said
    assert "Traceback" not in said
    main(["fit", *arguments, "--ckpt_path", "last"])
    assert_same_end(folder_of(exact), parts)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(exact: list[str], tmp_path: Path) -> None:
    beat, run = tmp_path / "beat", tmp_path / "run"
    process = start([*exact, "--trainer.default_root_dir", str(run), *slowly(beat, 10.0)])
    wait_for(beat, "batch 1", process)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said = finished(process)
    assert process.returncode == 130, said
    assert time.monotonic() - begun < 8  # less than the pause that it is in
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(exact: list[str], tmp_path: Path) -> None:
    """Only one of them is told; then both go on to the same weights."""
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.workers", "1"]
    arguments = [*exact, *ranks]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = start([*arguments, "--trainer.default_root_dir", str(whole)], command=TWO_RANKS)
    said = finished(first)
    assert first.returncode == 0, said
    arguments += ["--trainer.default_root_dir", str(parts)]
    beat = tmp_path / "beat"
    process = start([*arguments, *slowly(beat, 0.5)], command=TWO_RANKS)
    wait_for(beat, "batch 4", process)
    os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
    said = finished(process)
    assert said.count("after step 2: the state is saved in") == 1, said
    assert "exitcode  : 143" in said
    again = start([*arguments, "--ckpt_path", "last"], command=TWO_RANKS)
    said = finished(again)
    assert again.returncode == 0, said
    assert_same_end(whole, parts)

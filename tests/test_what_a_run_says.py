"""What a run says: of a recipe that changed, of a failure, and before its progress bar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.cli import _user_message, main
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.runs.directory import differences


def test_a_resumed_run_says_what_differs_and_the_recipe_holds(
    recipe: list[str], tmp_path: Path, caplog: Any
) -> None:
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    caplog.clear()
    main(["fit", *recipe, "--trainer.max_steps", "2", "--model.beta", "7", "--ckpt_path", "last"])
    [said] = [r.message for r in caplog.records if "differs" in r.message]
    assert said.splitlines()[1:] == [
        "  trainer.max_steps: 1 → 2",
        "  model.init_args.beta: 5000.0 → 7.0",
    ]
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert yaml.safe_load(last["recipe"])["model"]["init_args"]["beta"] == 7
    caplog.clear()
    main(["fit", *recipe, "--trainer.max_steps", "2", "--model.beta", "7", "--ckpt_path", "last"])
    assert not [r for r in caplog.records if "differs" in r.message]


def test_differences_of_recipes() -> None:
    old = "{a: {b: 1, c: [x, y]}, gone: 1.5, ckpt_path: null, same: null}"
    new = "{a: {b: two, c: [x]}, new: {}, ckpt_path: last.ckpt, same: null}"
    assert differences(old, new) == [
        "a.b: 1 → two",
        "a.c.1: y → (absent)",
        "gone: 1.5 → (absent)",
        "new: (absent) → {}",
    ]


def test_a_sentence_speaks_for_what_was_raised_from_it_alone() -> None:
    def handled() -> None:
        try:
            raise InputError("handled")
        except InputError:
            raise KeyError("another failure")  # noqa: B904 - as a bug in a handler raises it

    def chained() -> None:
        try:
            raise InputError("the cure")
        except InputError as error:
            raise RuntimeError("wrapped") from error

    with pytest.raises(KeyError, match="another failure") as unrelated:
        handled()
    assert _user_message(unrelated.value) is None
    with pytest.raises(RuntimeError, match="wrapped") as wrapped:
        chained()
    assert _user_message(wrapped.value) == "the cure"


FEWER = "--data.batch_size 4 --batch.pairs 4 --data.batches 2 --data.round_size 2"
QUANTIZED = (
    "toy-diffusion-dpo --backbone.lora LoRA --backbone.lora.rank 4 --backbone.quantization nf4 "
    "--model.optimizer AdamW8bit"
)
"""Imports bitsandbytes, which is postponed until then."""

OURS = (
    r"Seed set to \d+",
    r"Training [\d.]+ \w of [\d.]+ \w parameters \([\d.]+ MB\) on cpu\.",
    r"Collected \d+ from \d+ prompts on this rank\.",
    r"`Trainer\.fit` stopped: `max_steps=\d+` reached\.",
    r"Exported weights \(diffusers' layout\): .+",
    r"Epoch \d+ .* \d+/\d+ .*",
)
"""All that a short run prints; beside these there are warnings about the user's data."""


def not_ours(lines: Iterable[str]) -> list[str]:
    """Return the lines that are none of `OURS`."""
    return [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)]


def test_a_run_logs_what_is_ours_alone(
    recipe: list[str], caplog: Any, recwarn: pytest.WarningsRecorder
) -> None:
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    logged = [record.getMessage() for record in caplog.records]
    assert not not_ours(logged)
    assert [line.split(" ")[0] for line in logged[:2]] == ["Seed", "Training"]
    hidden = (DeprecationWarning, PendingDeprecationWarning)  # by Python itself
    warned = [one.message for one in recwarn if not issubclass(one.category, hidden)]
    # the tiny tokenizer has 16 tokens, and spells: the only warning is about the user's data
    assert not [one for one in warned if "longer than a text encoder's context" not in str(one)]


def test_a_model_summary_that_the_recipe_names_is_shown(recipe: list[str], caplog: Any) -> None:
    named = ["--trainer.callbacks+", "ModelSummary", "--trainer.max_steps", "1"]
    main(["fit", *recipe, *named])
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "Trainable params" in logged
    assert "Training " not in logged


@pytest.mark.slow
@pytest.mark.parametrize("args", ["toy-diffusion-dpo", f"toy-spo {FEWER}", QUANTIZED])
def test_a_run_prints_what_is_ours_alone(args: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lit_prefopt.cli", "fit", "--config", *args.split()]
    command += ["--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    printed = run.stdout.decode()
    assert run.returncode == 0, printed
    # a bar that was removed ends in a carriage return
    lines = [line.rsplit("\r", 1)[-1].strip() for line in printed.split("\n")]
    assert not not_ours(line for line in lines if line)
    assert lines[1].startswith("Training ")


def test_the_bar_of_a_run_bounded_by_steps_names_no_last_epoch(
    recipe: list[str], tmp_path: Path
) -> None:
    bar = [
        "--trainer.callbacks+",
        "tests.test_what_a_run_says.Bars",
        "--trainer.enable_progress_bar",
        "true",
    ]
    main(["fit", *recipe, *bar, "--trainer.max_steps", "1"])
    assert Bars.said.strip() == "Epoch 0"
    other = ["--trainer.default_root_dir", str(tmp_path / "other"), "--trainer.max_steps", "1"]
    main(["fit", *recipe, *bar, *other, "--trainer.max_epochs", "2"])
    assert Bars.said.strip() == "Epoch 0/1"


class Bars(Callback):
    """Notes what stands before the bar."""

    said = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Bars.said = trainer.progress_bar_callback._get_train_description(trainer.current_epoch)


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (-1, {"least": 0}, "from 0"),
        (2, {"least": 0, "most": 1}, "from 0 up to 1"),
        (0, {"above": 0}, "above 0"),
        (float("nan"), {}, "that is finite"),
        (float("inf"), {"least": 1}, "from 1"),
    ],
)
def test_numbers_out_of_range(value: float, limits: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=f"share is {value}; give a number {words}."):
        check_number("share", value, **limits)
    with pytest.raises(InputError, match=f"share is None; give a number {words}."):
        check_number("share", None, **limits)
    check_number("share", None, **limits, optional=True)
    check_number("share", 1, **limits)

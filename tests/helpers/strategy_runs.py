"""Runs on two processes, one after the other in the same two: importing takes longer than they."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.helpers.recipes import small_recipe
from tests.helpers.runs import TORCHRUN, launch

RANKS = [*TORCHRUN, "-m", "tests.helpers.two_ranks_commands"]
CPU = "tests.helpers.strategies_cpu"
PATIENCE = 1500


def zero(stage: int, *options: str) -> list[str]:
    """Return the arguments that name ZeRO on CPUs, whose class is a test's."""
    named = [f"--trainer.strategy.{option}=true" for option in options]
    return ["--trainer.strategy", f"{CPU}.CPUZeRO", "--trainer.strategy.stage", str(stage), *named]


STRATEGIES = {
    "ddp": ["--trainer", "hardware/ddp.yaml"],
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero2-offload": zero(2, "offload_optimizer"),
    "zero3-offload": zero(3, "offload_optimizer", "offload_parameters"),
    "fsdp": ["--trainer", "hardware/fsdp.yaml"],
}
FORMS = {
    "full": ["--model.optimizer.lr", "1e-3"],
    "lora": ["--backbone.lora.rank", "4", "--model.optimizer.lr", "1e-2"],
}


def case(
    pipeline: str,
    shards: str,
    folder: Path,
    strategy: str,
    form: str,
    *more: str,
    name: str = "toy-diffusion-dpo",
) -> list[str]:
    """Return the command of a run of ten steps on two ranks, four pairs on each."""
    return [
        *("fit", *small_recipe(pipeline, shards, folder, name)),
        *("--trainer.max_steps", "10", "--trainer.limit_val_batches", "0", "--model.beta", "1000"),
        *(*STRATEGIES[strategy], "--trainer.devices", "2", *FORMS[form]),
        *("--trainer.callbacks+", f"{CPU}.Seen", "--trainer.callbacks.folder", str(folder)),
        *more,
    ]


def run_cases(cases: list[list[str]], file: Path) -> str:
    """Run them, and return what was said."""
    file.write_text(json.dumps(cases))
    process = launch([str(file)], command=RANKS)
    try:
        said = process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        said = process.communicate()[0]
        raise AssertionError(f"not at its end after {PATIENCE} s:\n{said}") from None
    assert process.returncode == 0, said
    return said

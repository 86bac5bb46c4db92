"""CPU seconds of the first and the second evaluation of a run, against another checkout.

    python -m benchmarks.second_evaluation --before ../earlier-checkout

A run of the quickstart takes a step and evaluates its policy against the base on held-out prompts;
`test` evaluates the checkpoint on the same ones. Both checkouts run turn about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

HERE = Path(__file__).resolve()
PROGRAM = "import runpy, sys; runpy.run_path(sys.argv[1])['evaluate_twice'](*sys.argv[2:])"


def evaluate_twice(folder: str, prompts: str) -> None:
    """Run a `fit` and a `test`, and print the CPU seconds of each evaluation as JSON.

    Args:
        folder: The run's directory.
        prompts: Number of prompts.
    """
    from lit_prefopt.callbacks.evaluation import Evaluation
    from lit_prefopt.cli import main as run_command

    seconds, evaluate = [], Evaluation.run

    def timed(self: Any, *args: Any) -> None:
        begun = time.process_time()
        evaluate(self, *args)
        seconds.append(time.process_time() - begun)

    Evaluation.run = timed  # type: ignore[method-assign]
    arguments = ["--config", "quickstart", "--trainer.default_root_dir", folder]
    arguments += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.callbacks.prompts.count", prompts]
    run_command(["fit", *arguments])
    run_command(["test", *arguments, "--ckpt_path", "last"])
    print(json.dumps(seconds))


def cpu_seconds(checkout: Path, prompts: int) -> list[float]:
    """Return the CPU seconds of both evaluations.

    Args:
        checkout: Root of the checkout.
        prompts: Number of prompts.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, str(HERE), f"{folder}/run", str(prompts)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The evaluations failed: {done.stderr}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    before: Path | None = None, prompts: int = 64, rounds: int = 3, report: bool = False
) -> None:
    """Print a table.

    Args:
        before: Root of the other checkout.
        prompts: Number of prompts.
        rounds: Rounds.
        report: Write a dated report.
    """
    checkouts = {"now": HERE.parents[1]} | ({} if before is None else {"before": before.resolve()})
    found: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            found[name].append(cpu_seconds(checkout, prompts))
    lines = ["| checkout | first evaluation (CPU seconds) | second | range |", "|---|---|---|---|"]
    for name, values in found.items():
        first, second = zip(*values, strict=True)
        span = f"{min(second):.2f} to {max(second):.2f}"
        lines.append(f"| {name} | {median(first):.2f} | {median(second):.2f} | {span} |")
    if before is not None:
        before_second, now_second = (
            median(second for _, second in found[name]) for name in ("before", "now")
        )
        ratio = before_second / now_second
        lines.append(f"\nSecond evaluation, before / now: {ratio:.2f} ({prompts} prompts).")
    text = "\n".join(lines)
    print(text)
    if report:
        from benchmarks.common import write_report  # heavy

        print(write_report("second_evaluation", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""All that is to be measured when a GPU is at hand, within 25 minutes, in one report.

    python -m benchmarks.gpu_visit main
    python -m benchmarks.gpu_visit main --size toy --minutes 10

Every measurement is a process of its own with a time limit: one that fails or hangs costs its own
figures and no others, and the report is written anew after each. The most important come first.
`--size toy` runs the same on tiny networks and on the CPU, to see that all of it works.

A GPU machine without a network gets the packages that it lacks as wheels: download them elsewhere
(`pip download --only-binary=:all: --no-deps --dest wheels diffusers jsonargparse ...`, for its
Python and platform), carry the folder along, and begin with

    python -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site:. python -m benchmarks.gpu_visit main --output report.md
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import auto_cli

from benchmarks.common import write_report
from benchmarks.memory import SAVINGS

TAIL, LAST = 60, 15  # lines of a measurement's output, and of what a failed one complains of


class Task(NamedTuple):
    """One measurement."""

    title: str
    command: list[str]  # what Python is to run
    seconds: int  # after which it is given up


def fit(name: str, arguments: str) -> list[str]:
    """Return an estimate's command: pairs/s, peak memory and MFU of a recipe."""
    return ["-m", "lit_prefopt.cli", "estimate", "--config", name, *arguments.split()]


def step_time(arguments: str) -> list[str]:
    """Return the command that times a step against a plain loop."""
    return ["-m", "benchmarks.step_time", *arguments.split()]


def tasks(size: str, folder: Path) -> Iterator[Task]:
    """Yield what is measured, the most important first."""
    small, large = ("tiny", "tiny-xl") if size == "toy" else ("sd15", "sdxl")
    full = size == "full"
    where = f"--folder {folder / 'step-time'}"
    made = f"from benchmarks.recipes import *; recipe({large!r}, 'lora', 'images', "
    made += f"Path({str(folder / 'step-time')!r})); recipe({small!r}, 'lora', 'images', "
    made += f"Path({str(folder / 'step-time')!r}))"
    yield Task("networks and shards are made", ["-c", made], 240)
    pytest = ["-m", "pytest", "-x", "-m", "gpu", "tests/test_gpu.py"]
    if not full:
        pytest.append("--collect-only")
    yield Task("tests on the device", pytest, 240)
    some, many = ("4", "16") if full else ("2", "4")
    for train, rows, more in (  # `more` as options of step_time
        ("lora", "1", ""),
        ("lora", many, ""),
        ("lora", many, "--data reference"),
        ("full", "1", ""),
        ("full", some, "--bf16_weights true --data reference"),
    ):
        words = f"--family {large} --train {train} --batch {rows} --steps 8 --workers 4 {where}"
        title = f"{large}, {train}, {rows} pairs{more and f', {more}'}"
        yield Task(
            f"{title}: a step against a plain loop",
            step_time(f"{words} {more}"),
            240 if "reference" in more else 150,  # the caches are made first
        )
    for train in ("lora", "full"):
        words = f"--family {small} --train {train} --batch 8 --steps 10 --workers 4 {where}"
        title = f"{small}, {train}, 8 pairs: a step against a plain loop"
        yield Task(title, step_time(words), 120)
    for title, train, options in (
        ("as shipped", "lora", ""),
        ("channels last", "lora", "--backbone.channels_last true"),
        ("compiled", "lora", "--backbone.compile true"),
        (
            "compiled, channels last",
            "lora",
            "--backbone.compile true --backbone.channels_last true",
        ),
        ("no checkpointing", "lora", "--backbone.gradient_checkpointing false"),
        ("checkpointing", "lora", "--backbone.gradient_checkpointing true"),
        ("AdamW8bit", "full", "--model.optimizer AdamW8bit"),
        (
            "AdamW8bit, bf16 weights, gradients let go",
            "full",
            f"--model.optimizer AdamW8bit {SAVINGS['bf16_weights']}",
        ),
        ("Adafactor", "full", "--model.optimizer Adafactor"),
        ("AdamW, not fused", "full", "--model.optimizer.fused false"),
    ):
        arguments = ["variant", "--family", large, "--train", train, "--folder", str(folder)]
        command = ["-m", "benchmarks.gpu_visit", *arguments, f"--options={options}"]
        yield Task(f"{large}, {train}, {title}: estimate", command, 120)
    pairs = "200" if full else "16"
    words = f"--pairs {pairs} --side 512 --workers [0,4] --repeats 2 --folder {folder / 'loader'}"
    yield Task("loader", ["-m", "benchmarks.loader", *words.split()], 90)
    device = "cuda" if full else "cpu"
    words = f"--family {large} --train lora --device {device} {where}"
    profile = ["-m", "benchmarks.profile_step", *words.split()]
    yield Task(f"{large}, lora: the ten largest items of a step", profile, 120)
    family = small if size == "toy" else large
    words = f"main --families [{family}] --trains [lora,full] --optimizers [AdamW,AdamW8bit] "
    words += "--checkpointing [true] --savings [none,bf16_weights,cached]"
    words += f" --folder {folder / 'step-time'}"
    memory = ["-m", "benchmarks.memory", *words.split()]
    yield Task(f"{family}: memory, estimated and measured", memory, 360)


def variant(
    family: Literal["tiny", "tiny-xl", "sd15", "sdxl"],
    train: Literal["full", "lora"],
    folder: str,
    options: str = "",
) -> None:
    """Estimate a recipe with other options.

    Args:
        family: The model.
        train: All weights of the UNet, or a LoRA.
        folder: Where pipelines and shards are written.
        options: More arguments of `lit-prefopt fit`.
    """
    from benchmarks.recipes import recipe
    from lit_prefopt.commands.estimate import estimate

    made = recipe(family, train, "images", Path(folder) / "step-time", workers=2)
    estimate([*made.arguments, *options.split(), "--steps", "5"])


def run(task: Task, seconds: float, logs: Path) -> str:
    """Run a task with a time limit and return the last lines of its output.

    Args:
        task: The measurement.
        seconds: After which it is ended.
        logs: Path of its full output, with the suffixes .out and .err.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    output, complained = logs.with_suffix(".out"), logs.with_suffix(".err")
    with output.open("w") as out, complained.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *task.command],
            stdout=out,
            stderr=err,
            env={**os.environ, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            ended = f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"given up after {seconds:.0f} s"
    lines = _lines(output)[-TAIL:]
    if ended:
        lines += [*_lines(complained)[-LAST:], f"({ended})"]
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    return [line.split("\r")[-1] for line in path.read_text(errors="replace").splitlines()]


def main(
    size: Literal["full", "toy"] = "full",
    minutes: float = 25,
    output: str | None = None,
    folder: str = "runs/gpu-visit",
    only: str = "",
) -> None:
    """Measure everything.

    Args:
        size: Full-size networks with random weights, or tiny ones.
        minutes: After which nothing more is begun.
        output: The report; a dated one beside the others where it is not given.
        folder: Where pipelines, shards and logs are written.
        only: Measure only what has this in its title, beside making the networks.
    """
    end = time.monotonic() + 60 * minutes
    report: list[str] = []
    path = Path(output) if output else None
    for number, task in enumerate(tasks(size, Path(folder))):
        if number and only not in task.title:
            continue
        left = end - time.monotonic()
        report += [f"## {task.title}", ""]
        if left < 10:
            report += ["(no time was left)", ""]
        else:
            start = time.monotonic()
            printed = run(task, min(task.seconds, left), Path(folder) / "logs" / f"{number:02d}")
            took = time.monotonic() - start
            report += [f"{took:.0f} s", "", "```", printed, "```", ""]
            print(f"{task.title}: {took:.0f} s", flush=True)
        path = write_report("gpu_visit", "\n".join(report), size, path)
    print(path)


if __name__ == "__main__":
    auto_cli({"main": main, "variant": variant}, as_positional=False)

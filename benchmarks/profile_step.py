"""The ten largest items of a training step, by torch's profiler.

python -m benchmarks.profile_step --family toy
python -m benchmarks.profile_step --family sdxl --train lora --device cuda
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import write_report
from benchmarks.recipes import Family, Train, recipe
from benchmarks.step_time import fitted
from lit_prefopt.utils.device import synchronize

ITEMS = 10


class Profile(Callback):
    """Profiles the last steps of a run.

    Args:
        warm: Steps before them.
    """

    seen: ClassVar[Any]
    seconds: ClassVar[float]

    def __init__(self, warm: int) -> None:
        self.warm = warm

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin after the first steps."""
        if trainer.global_step == self.warm:
            device = trainer.strategy.root_device
            synchronize(device)
            cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            Profile.seen = profile(activities=[ProfilerActivity.CPU, *cuda])
            Profile.seen.start()
            self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        synchronize(trainer.strategy.root_device)
        Profile.seconds = time.perf_counter() - self.since
        Profile.seen.stop()


def main(
    family: Family = "toy",
    train: Train = "full",
    device: Literal["cpu", "cuda"] = "cpu",
    steps: int = 4,
    batch: int | None = None,
    options: str = "",
    folder: str = "runs/step-time",
    report: bool = False,
) -> None:
    """Profile.

    Args:
        family: The model.
        train: All weights of the UNet, or a LoRA.
        device: Where it trains.
        steps: How many steps are profiled, after two that are not.
        batch: Pairs in a batch; by default the family's own number.
        options: More arguments of `lit-prefopt fit`, such as "--backbone.compile true".
        folder: Where pipelines and shards are written.
        report: Write a report as well.
    """
    made = recipe(family, train, "images", Path(folder), batch=batch)
    place = ["--trainer.accelerator", "gpu" if device == "cuda" else "cpu"]
    callback = ["--trainer.callbacks+", "benchmarks.profile_step.Profile"]
    callback += ["--trainer.callbacks.warm", "2"]
    fitted([*made.arguments, *place, *options.split()], steps + 2, callback)
    from benchmarks.profile_step import Profile as Used  # the class that the recipe named

    text = table(Used.seen, Used.seconds / steps, steps, device)
    text = (
        f"{family}, {train}, {made.batch} pairs of {made.resolution} pixels on {device}{options}, "
        + text
    )
    print(text)
    if report:
        variant = "-".join([family, train, device, *options.replace("-", "").split()])
        print(write_report("profile_step", text, variant))


def table(seen: Any, seconds: float, steps: int, device: str) -> str:
    """Return the ten largest items.

    Args:
        seen: The profiler.
        seconds: Of a step.
        steps: How many were profiled.
        device: Whose time counts.
    """
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # The range `Optimizer.step` spans the whole closure, that is the forward and the backward too.
    operations = [r for r in seen.key_averages() if not r.key.startswith("Optimizer.")]
    rows = sorted(operations, key=lambda row: -getattr(row, name))
    total = sum(getattr(row, name) for row in rows) / steps / 1e3
    lines = [
        f"mean of {steps} steps, {seconds * 1e3:.1f} ms each under the profiler; "
        f"{torch.get_num_threads()} threads; operations take {total:.1f} ms of {device} time.",
        "",
        "| operation, its own time | ms a step | share | calls a step |",
        "|---|---|---|---|",
    ]
    for row in rows[:ITEMS]:
        ms = getattr(row, name) / steps / 1e3
        lines.append(
            f"| `{row.key[:70]}` | {ms:.2f} | {ms / total:.1%} | {row.count / steps:.0f} |"
        )
    rest = sum(getattr(row, name) for row in rows[ITEMS:]) / steps / 1e3
    lines.append(f"| {len(rows) - ITEMS} others | {rest:.2f} | {rest / total:.1%} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

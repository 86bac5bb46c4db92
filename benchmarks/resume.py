"""Seconds from the start of the process to the first optimizer step: fresh, and resumed.

    python -m benchmarks.resume --report true

10,000 pairs of small images, two workers, a pipeline with random weights; the resumed run stands
late in its epoch. Every figure is the median of the repetitions.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer

from benchmarks.common import write_report
from lit_prefopt.data.shards.writer import ShardWriter
from tests.helpers.tiny import tiny_pipeline

BATCH = 40


class StopAfter(Callback):
    """Writes the time of the first optimizer step into a file, and stops.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note the time."""
        if not self.path.exists():
            self.path.write_text(f"{time.time()} {trainer.global_step}")
        trainer.should_stop = True


def write_pairs(folder: Path, pairs: int) -> None:
    """Write pairs of random images of 32 x 32 pixels."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, max_count=1000) as writer:
        for i in range(pairs):
            images = random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
            writer.add(f"picture number {i}", images[0], images[1])


def seconds_to_first_step(arguments: list[str], folder: Path) -> tuple[float, int]:
    """Return the seconds from process start to the end of the first step, and its number."""
    note = folder / "first-step"
    note.unlink(missing_ok=True)
    watch = ["--trainer.callbacks+", "benchmarks.resume.StopAfter"]
    watch += ["--trainer.callbacks.path", str(note)]
    begun = time.time()
    command = [sys.executable, "-m", "lit_prefopt.cli", "fit", *arguments, *watch]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ended, step = note.read_text().split()
    return float(ended) - begun, int(step)


def main(pairs: int = 10_000, late: float = 0.9, repeat: int = 3, report: bool = False) -> None:
    """Measure.

    Args:
        pairs: Pairs in the shards.
        late: Share of the epoch after which the run is stopped and resumed.
        repeat: How often each start is measured.
        report: Write a report as well.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs", pairs)
        pipeline = str(tiny_pipeline(folder / "pipeline"))
        steps = int(pairs / BATCH * late)
        common = ["--config", "toy-diffusion-dpo", "--backbone", "StableDiffusion"]
        common += ["--backbone.pretrained", pipeline, "--data", "PairShards", "--data.shards"]
        common += [str(folder / "pairs"), "--data.batch_size", str(BATCH), "--data.workers", "2"]
        common += ["--batch.pairs", str(BATCH)]
        common += ["--data.resolution", "32", "--trainer.enable_progress_bar", "false"]
        common += ["--trainer.max_steps"]
        run = ["--trainer.default_root_dir", str(folder / "run")]
        whole = [sys.executable, "-m", "lit_prefopt.cli", "fit", *common, str(steps), *run]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
        times: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for i in range(repeat):
            other = ["--trainer.default_root_dir", str(folder / f"fresh-{i}")]
            fresh, _ = seconds_to_first_step([*common, str(steps + 1), *other], folder)
            last = folder / "run" / "checkpoints" / "last.ckpt"
            other = ["--trainer.default_root_dir", str(folder / f"resumed-{i}")]
            other += ["--ckpt_path", str(last)]
            resumed, step = seconds_to_first_step([*common, str(steps + 1), *other], folder)
            assert step == steps + 1, step
            times["fresh"].append(fresh)
            times["resumed"].append(resumed)
        lines = ["| start | first step | seconds (median) | all |", "|---|---|---|---|"]
        for kind, first in (("fresh", 1), ("resumed", steps + 1)):
            each = ", ".join(f"{s:.1f}" for s in times[kind])
            lines.append(f"| {kind} | {first} | {median(times[kind]):.1f} | {each} |")
    text = "\n".join(
        [f"{pairs} pairs, batches of {BATCH}, stopped after step {steps}.", "", *lines]
    )
    print(text)
    if report:
        print(write_report("resume", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""CPU seconds from the start of `fit` to its first batch, against another checkout.

    python -m benchmarks.first_batch --before ../earlier-checkout

Both checkouts run turn about, in processes of their own; the first round fills the caches of
bytecode and is not counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import Callback

HERE = Path(__file__).resolve()
COPY = "first_batch_callback"
"""Name of a copy of this file: the other checkout has a package `benchmarks` of its own."""


class StopAtFirstBatch(Callback):
    """Writes the CPU seconds of the process into a file before the first batch, and ends it."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Write the seconds."""
        Path(os.environ["FIRST_BATCH"]).write_text(str(time.process_time()))
        os._exit(0)


def cpu_seconds(checkout: Path, recipe: str, folder: Path) -> float:
    """Return the CPU seconds of a checkout.

    Args:
        checkout: Its root.
        recipe: Name of the recipe.
        folder: Folder for the run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(HERE, folder / f"{COPY}.py")
    note = folder / "seconds"
    paths = f"{checkout}{os.pathsep}{folder}"
    command = [sys.executable, "-m", "lit_prefopt.cli", "fit", "--config", recipe]
    command += ["--trainer.default_root_dir", str(folder / "run")]
    command += ["--trainer.callbacks+", f"{COPY}.StopAtFirstBatch"]
    environment = {**os.environ, "PYTHONPATH": paths, "FIRST_BATCH": str(note)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not note.is_file():
        raise RuntimeError(f"{' '.join(command)} did not reach its first batch: {done.stderr}")
    return float(note.read_text())


def main(
    before: Path | None = None,
    recipe: str = "toy-diffusion-dpo",
    rounds: int = 3,
    report: bool = False,
) -> None:
    """Print a table.

    Args:
        before: Root of the other checkout.
        recipe: Name of a recipe that both have.
        rounds: Counted rounds.
        report: Write a dated report.
    """
    checkouts = {"now": HERE.parents[1]} | ({} if before is None else {"before": before.resolve()})
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            for name, checkout in checkouts.items():
                seconds[name].append(cpu_seconds(checkout, recipe, Path(folder) / "work"))
    lines = ["| checkout | CPU seconds to the first batch (median) | range |", "|---|---|---|"]
    for name, values in seconds.items():
        counted = values[1:]
        span = f"{min(counted):.2f} to {max(counted):.2f}"
        lines.append(f"| {name} | {median(counted):.2f} | {span} |")
    if before is not None:
        ratio = median(seconds["now"][1:]) / median(seconds["before"][1:])
        lines.append(f"\nNow / before: {ratio:.2f} (`fit --config {recipe}`, {rounds} rounds).")
    text = "\n".join(lines)
    print(text)
    if report:
        from benchmarks.common import write_report  # heavy

        print(write_report("first_batch", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""CPU seconds of whole runs from images, with the caches that a fit fills itself and without.

    python -m benchmarks.fit_caches --pairs 256 --visits 8 --rounds 3
    python -m benchmarks.fit_caches --family tiny --pairs 32 --visits 3 --rounds 1

Every run is `lit-prefopt fit` from its start to its last step, in this process and turn about, with
an empty cache: loading the model, the first visits and writing are counted. `stored` keeps latents
and prompts, `stored, N draws` the reference's errors at N fixed draws of each pair too. Losses of
`without` and `stored` must be equal to the last bit.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.common import write_report
from benchmarks.recipes import Family, Train, recipe
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.writer import ShardWriter


class Losses(Callback):
    """Collects the loss of every batch of the runs of this process."""

    found: list[torch.Tensor] = []  # noqa: RUF012 - the command line makes the object

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """Collect a loss."""
        self.found.append(loss.detach().clone())


def subset(shards: Path, folder: Path, pairs: int) -> Path:
    """Write the first pairs of some shards, once, and return their folder."""
    if not (folder / "index.json").is_file():
        reader = ShardReader(read_index(shards))
        with ShardWriter(folder, max_count=pairs) as writer:
            for number in range(min(pairs, reader.counts[0])):
                sample = reader(0, number)
                writer.add(sample.text, *sample.sides, sample.meta)
    return folder


def main(
    family: Family = "toy",
    train: Train = "full",
    pairs: int = 256,
    visits: int = 8,
    draws: int = 2,
    batch: int = 16,
    rounds: int = 3,
    folder: str | None = None,
    report: bool = False,
) -> None:
    """Measure whole runs with and without the caches of a fit.

    Args:
        family: The model.
        train: All weights of the denoiser, or a LoRA of rank 16.
        pairs: Training pairs.
        visits: Visits of each pair.
        draws: Fixed draws of each pair.
        batch: Pairs in a batch.
        rounds: Runs of each kind, turn about.
        folder: Folder of models and shards, kept for the next call; a temporary one by default.
        report: Also write a report.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder or temporary)
        made = recipe(family, train, "images", root, batch=batch, pairs=pairs)
        shards = subset(made.shards, root / f"{family}-{pairs}", pairs)
        steps = pairs // batch * visits
        common = [*made.arguments, "--data.shards", str(shards)]
        common += ["--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"]
        common += ["--trainer.enable_checkpointing", "false"]
        common += ["--trainer.callbacks", "LearningRateMonitor"]
        common += ["--trainer.callbacks+", "benchmarks.fit_caches.Losses"]
        found = importlib.import_module("benchmarks.fit_caches").Losses.found  # not __main__'s
        kinds: dict[str, list[str]] = {
            "without": ["--data.keep_encodings", "false"],
            "stored": ["--data.keep_encodings", "true"],
            f"stored, {draws} draws": ["--data.keep_encodings", "true", "--data.draws", f"{draws}"],
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        losses: dict[str, torch.Tensor] = {}
        for _ in range(rounds):
            for kind, own in kinds.items():
                cache = Path(temporary) / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                run = [*common, *own, "--data.cache", str(cache)]
                run += ["--trainer.default_root_dir", str(Path(temporary) / "run")]
                found.clear()
                seconds[kind].append(cpu_seconds(lambda run=run: lit_prefopt(["fit", *run])))
                shutil.rmtree(Path(temporary) / "run", ignore_errors=True)
                losses[kind] = torch.stack(found)
                print(f"{kind}: {seconds[kind][-1]:.1f} CPU seconds", flush=True)
                size = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
        equal = torch.equal(losses["without"], losses["stored"])
        assert equal, (losses["without"] - losses["stored"]).abs().max()
    text = table(seconds, steps, batch)
    text += f"\n\nThe {len(losses['stored'])} losses of `without` and `stored` are equal to the "
    text += f"last bit. The last store has {size / 1e6:.1f} MB."
    print(text)
    if report:
        print(write_report("fit_caches", text, f"{family}-{train}"))


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds of this process in a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def table(seconds: dict[str, list[float]], steps: int, batch: int) -> str:
    """Return the figures.

    Args:
        seconds: CPU seconds of every run by kind.
        steps: Optimizer steps of a run.
        batch: Pairs in a step.
    """
    base = median(seconds["without"])
    lines = [
        f"{steps} steps of {batch} pairs; {torch.get_num_threads()} threads; medians.",
        "",
        "| | CPU s of the whole run | lowest to highest | times the pairs/s |",
        "|---|---|---|---|",
    ]
    for kind, times in seconds.items():
        middle = median(times)
        spread = f"{min(times):.1f} to {max(times):.1f}"
        lines.append(f"| {kind} | {middle:.1f} | {spread} | {base / middle:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""A training step as `lit-prefopt fit` takes it against a plain loop, turn about, on one model.

    python -m benchmarks.step_time --family toy --steps 100
    python -m benchmarks.step_time --family sd15 --train full --steps 3
    python -m benchmarks.step_time --family sd15 --data reference --pairs 8 --steps 3

Both train the same networks with the same optimizer in one process, one step each in turn; `fit` is
the real command with its data module, log and callbacks, the plain loop is `plain.py`. The time of
a step runs from the end of the other's to its own, waiting for data and logging included. The parts
of a step are timed alone afterwards, and the floor is the work that the method needs over the
matmul peak that this machine reaches in the same minute. With `--data cached` or `reference` the
fit reads caches of the same pairs, and the networks that it does not use then stay in memory for
the plain loop; from the parts follows how much faster the fit should be. For `toy` a second run of
`fit` alone is profiled, to see where the Python of a step goes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.common import write_report
from benchmarks.plain import PlainLoop, PlainPairs, networks_of
from benchmarks.python_time import python_of, shares
from benchmarks.recipes import KINDS, Data, Family, Train, dtype_of, recipe
from lit_prefopt.batches import Batch
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.estimate.step_cost import checkpointing, step_cost
from lit_prefopt.utils.device import matmul_peak, peak_bytes, reset_peak, synchronize

GIB = 2**30
WARM = 1  # steps of each that are not counted
VAE, TEXT, REFERENCE = "VAE", "text encoders", "reference"
SPARED: dict[str, tuple[str, ...]] = {
    "images": (),
    "cached": (VAE, TEXT),
    "reference": (VAE, TEXT, REFERENCE),
}
"""The parts of a step that each form of the data omits."""


class Turns(Callback):
    """Takes a step of the plain loop after each step of the fit, and the time of both.

    Args:
        shards: What the plain loop reads.
        resolution: Width and height of its images.
        workers: Of its DataLoader.
        repeats: How often each part is timed alone.
    """

    last: ClassVar[Turns]

    def __init__(self, shards: str, resolution: int, workers: int, repeats: int = 1) -> None:
        self.pairs = PlainPairs(Path(shards), resolution)
        self.workers, self.repeats = workers, repeats
        self.seconds: dict[str, list[float]] = {"fit": [], "plain": []}
        self.peaks: dict[str, int] = {"fit": 0, "plain": 0}
        self.alone: dict[str, float] = {}
        self.flops = 0
        Turns.last = self

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the plain loop up on the same networks."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.device = trainer.strategy.root_device
        pinned = self.device.type == "cuda"
        self.batches = self.pairs.batches(data.batch_size, self.workers, pinned=pinned)
        context = trainer.precision_plugin.forward_context
        backbone, optimizer = module.backbone, trainer.optimizers[0]
        networks, dtype = networks_of(backbone), backbone.dtype
        self.loop = PlainLoop(networks, optimizer, module.beta, context, dtype=dtype)
        next(self.batches)  # its workers are there, as the fit's will be
        reset_peak(self.device)
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """End the fit's turn, and take the plain loop's."""
        self._note("fit")
        self.images, self.texts = next(self.batches)
        self.loop.step(self.images, self.texts)
        self._note("plain")
        self.batch = batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the parts alone."""
        module: Any = pl_module
        context = trainer.precision_plugin.forward_context
        images = self.images.to(self.device)
        for name, part in parts(module, self.batch, images, self.texts, trainer.optimizers[0]):
            self.alone[name] = median(self._timed(part, context) for _ in range(self.repeats))
        with checkpointing(module, False):
            self.flops = step_cost(module, self.batch, context).flops

    def _note(self, whose: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[whose].append(now - self.since)
        if len(self.seconds[whose]) > WARM:
            self.peaks[whose] = max(self.peaks[whose], peak_bytes(self.device))
        reset_peak(self.device)
        self.since = time.perf_counter()

    def _timed(self, part: Callable[[], Any], context: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        with context():
            part()
        synchronize(self.device)
        return time.perf_counter() - start


def parts(
    module: Any, batch: Batch, images: Tensor, texts: list[str], optimizer: Any
) -> Iterator[tuple[str, Callable]]:
    """Yield what a step of Diffusion-DPO is made of, by name.

    Args:
        module: The method.
        batch: What the fit read.
        images: What the plain loop read, (B, K, 3, H, W).
        texts: B prompts.
        optimizer: Of the trained weights.
    """
    backbone = module.backbone
    pairs = module.form_pairs(batch)
    noised = module.add_noise(pairs)
    kept: list[Tensor] = []

    def reference() -> None:
        with backbone.as_reference():
            module.errors(noised)

    def policy() -> None:
        kept[:] = [module.errors(noised).value.mean()]

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()  # gradients stay for the next time

    yield VAE, lambda: backbone.encode(images.flatten(0, 1))
    yield TEXT, lambda: backbone.embed(texts)
    yield REFERENCE, reference
    yield "policy, forward and backward", lambda: (policy(), kept[0].backward())
    yield "clipping and optimizer", update


def fitted(arguments: list[str], steps: int, callback: list[str]) -> None:
    """Run `fit` for so many steps in a folder that does not stay, nothing saved at its end.

    What it keeps of its pairs stays in that folder, too, so that every fit begins alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "--trainer.enable_checkpointing",
            "false",
            "--trainer.enable_progress_bar",
            "false",
        ]
        beside = ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", folder]
        beside += ["--data.cache", f"{folder}/cache"]
        only = ["--trainer.callbacks", "LearningRateMonitor"]
        lit_prefopt(["fit", *arguments, *quiet, *beside, *only, *callback])


def main(
    family: Family = "toy",
    train: Train = "full",
    data: Data = "images",
    steps: int = 20,
    batch: int | None = None,
    workers: int = 0,
    pairs: int = 64,
    bf16_weights: bool = False,
    repeats: int = 1,
    folder: str = "runs/step-time",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        family: The model.
        train: All weights of the UNet, or a LoRA.
        data: What the fit reads; the plain loop reads images.
        steps: Steps of each that are counted.
        batch: Pairs in a batch; by default the family's own number.
        workers: Processes that read and decode, of each.
        pairs: How many pairs are made; the toy world has its own.
        bf16_weights: Train all weights in bfloat16, by AdamW8bit: less than half the memory.
        repeats: How often each part is timed alone.
        folder: Where pipelines and shards are written.
        report: Write a report as well.
    """
    kind = KINDS[family]
    options: dict[str, Any] = {
        "batch": batch,
        "workers": workers,
        "pairs": pairs,
        "bf16_weights": bf16_weights,
    }
    made = recipe(family, train, data, Path(folder), **options)
    fitted(
        made.arguments,
        steps + WARM,
        [
            *("--trainer.callbacks+", "benchmarks.step_time.Turns"),
            *("--trainer.callbacks.shards", str(made.shards)),
            *("--trainer.callbacks.resolution", str(made.resolution)),
            *("--trainer.callbacks.workers", str(workers)),
            *("--trainer.callbacks.repeats", str(repeats)),
        ],
    )
    from benchmarks.python_time import Profiled as Used  # the classes that the recipe named
    from benchmarks.step_time import Turns as Taken

    turns, matmul = Taken.last, matmul_peak(dtype_of(kind))
    text = table(turns, made.batch, matmul, SPARED[data])
    if family in ("toy", "tiny"):
        profiled = ["--trainer.callbacks+", "benchmarks.python_time.Profiled"]
        fitted(made.arguments, steps + 4, profiled)
        text += "\n\n" + python_of(shares(Used.profile, Used.steps), steps)
    how = f"{train}-bf16" if bf16_weights else train
    text = f"{family}, {how}, from {data}, {made.batch} pairs of {made.resolution} pixels, " + text
    print(text)
    if report:
        print(write_report("step_time", text, f"{family}-{how}-{data}"))


def table(turns: Turns, rows: int, matmul: float, omitted: tuple[str, ...]) -> str:
    """Return the figures.

    Args:
        turns: What was timed.
        rows: Pairs in a batch.
        matmul: TFLOP/s of this machine.
        omitted: Parts that the fit does without.
    """
    counted = {whose: times[WARM:] for whose, times in turns.seconds.items()}
    fit, plain = (median(counted[whose]) for whose in ("fit", "plain"))
    floor = turns.flops / 1e12 / matmul
    lines = [
        f"{len(counted['fit'])} steps each, turn about; {torch.get_num_threads()} threads.",
        "",
        "| | s a step, median | lowest | pairs/s | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for whose, times in counted.items():
        middle = median(times)
        peak = turns.peaks[whose] / GIB
        name = {"fit": "`lit-prefopt fit`", "plain": "plain loop"}[whose]
        rate = rows / middle
        lines.append(f"| {name} | {middle:.4g} | {min(times):.4g} | {rate:.3g} | {peak:.2f} |")
    lines += [
        f"| floor: {turns.flops / 1e12:.3g} TFLOP at {matmul:.3g} TFLOP/s | {floor:.4g} | | "
        f"{rows / floor:.3g} | |",
        "",
        f"The fit makes {plain / fit:.3f} times the plain loop's pairs/s; a step of it takes "
        f"{(fit - plain) * 1e3:+.1f} ms more.",
        "",
        "| part, timed alone | s | share |",
        "|---|---|---|",
    ]
    together = sum(turns.alone.values())
    lines += [f"| {n} | {s:.4g} | {s / together:.1%} |" for n, s in turns.alone.items()]
    own = together - sum(turns.alone[name] for name in omitted)
    lines.append(f"| together | {together:.4g} | |")
    lines += [
        "",
        f"By its parts the fit's step should take {own:.4g} s, {together / own:.3f} times the "
        f"plain loop's pairs/s; it reaches {plain / fit / (together / own):.3f} of that ratio.",
        "",
        f"A step of the fit takes {(fit - own) * 1e3:+.1f} ms more than its parts.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""`lit-prefopt estimate`: estimate a recipe's time and memory from a few dry steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from rich.console import Console
from rich.table import Table

from lit_prefopt.callbacks import Budget, Evaluation, ExportWeights, SampleGrid
from lit_prefopt.callbacks.disk_space import DiskSpace
from lit_prefopt.effective_batch import last_step
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.estimate.memory import FITS, GIB
from lit_prefopt.estimate.pace import Pace, device_name
from lit_prefopt.fit_caches.encoding_cache import size_in_words
from lit_prefopt.lightning_cli import PreferenceCLI, run_lightning
from lit_prefopt.recipe_files import named_recipes
from lit_prefopt.utils.device import memory_bytes

UNMEASURED_CALLBACKS = (
    ModelCheckpoint,
    EarlyStopping,
    ExportWeights,
    SampleGrid,
    Evaluation,
    Budget,
    DiskSpace,
)
"""Callbacks that take no part in a step."""


class Estimate(NamedTuple):
    """Estimated cost of a recipe."""

    device: str
    ranks: int
    pairs_per_second: float  # over all ranks
    step_seconds: float
    step_pairs: int  # of an optimizer step, over all ranks
    waiting: float  # share of the time spent waiting for data
    peak: int  # bytes of one rank
    pair_teraflops: float  # recomputation excluded
    matmul: float  # TFLOP/s
    utilisation: float
    steps: int  # of the whole recipe; -1 if it has no end
    epoch_seconds: float  # before the first batch of an epoch
    hours: float
    parts: dict[str, int]  # bytes, computed
    kept: int  # bytes of encodings that the training stores on the disk, at most
    advice: str  # on gradient checkpointing; empty if there is none


class EstimateCLI(PreferenceCLI):
    """Runs a recipe's first steps in a temporary folder."""

    pace: Pace
    folder: str

    def before_instantiate_classes(self) -> None:
        """Redirect the run's output to a temporary folder; disable validation and stored data."""
        config = self.config[self.subcommand]
        config.trainer.default_root_dir, config.trainer.limit_val_batches = self.folder, 0
        options = config.data.get("init_args") or {}
        if "keep_encodings" in options:
            self.pace.keeps_encodings = bool(options["keep_encodings"])
            options["keep_encodings"] = False
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the callbacks that take part in a step, and a timer."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kept = [c for c in callbacks if not isinstance(c, UNMEASURED_CALLBACKS)]
        trainer.callbacks = [*kept, self.pace]  # type: ignore[attr-defined]
        return trainer


def estimate(args: Sequence[str]) -> Estimate:
    """Estimate, print and return the cost of a recipe.

    Args:
        args: Arguments of `lit-prefopt fit`, and `--steps N`: number of optimizer steps to time,
            after a warm-up step.
    """
    steps, rest = _steps(args)
    check_number("steps", steps, 1)
    pace = Pace(steps)
    with tempfile.TemporaryDirectory(prefix="lit-prefopt-estimate-") as folder:
        kind = type("EstimateCLI", (EstimateCLI,), {"pace": pace, "folder": folder})
        cli = run_lightning(named_recipes(["fit", *rest]), kind)
    trainer = cli.trainer
    if not pace.timed:
        raise InputError(f"The recipe ends before {steps} optimizer steps: lower `--steps`.")
    found = _estimate(trainer, pace)
    if trainer.is_global_zero:
        print_estimate(found)
    return found


def _steps(args: Sequence[str]) -> tuple[int, list[str]]:
    """Parse `--steps N` (by default 3), and return it with the other arguments."""
    wanted = "an integer, such as `--steps 3`"
    value, rest = take_option(args, "--steps", wanted)
    with suppress(ValueError):
        return int(value or 3), rest
    raise InputError(f"--steps needs {wanted}.")


def take_option(args: Sequence[str], name: str, wanted: str) -> tuple[str | None, list[str]]:
    """Return an option's value, None if it is not given, with the other arguments.

    Args:
        args: Arguments, such as `--fit 24GiB` or `--fit=24GiB` among others.
        name: Name of the option.
        wanted: What it needs, for the message.
    """
    start = f"{name}="
    args = [
        part for arg in args for part in (arg.split("=", 1) if arg.startswith(start) else [arg])
    ]
    if name not in args:
        return None, args
    place = args.index(name)
    if place + 1 == len(args) or args[place + 1].startswith("--"):
        raise InputError(f"{name} needs {wanted}.")
    return args[place + 1], args[:place] + args[place + 2 :]


def _parts(arg: str, start: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith(start) else [arg]


def _estimate(trainer: Trainer, pace: Pace) -> Estimate:
    ranks, step_seconds = trainer.world_size, pace.step_seconds
    pairs = pace.rows * pace.accumulated * ranks
    steps = last_step(trainer, trainer.num_training_batches, pace.accumulated)
    epochs = max(steps, 0) * pace.accumulated / trainer.num_training_batches
    return Estimate(
        device=device_name(pace.device),
        ranks=ranks,
        pairs_per_second=pairs / step_seconds,
        step_seconds=step_seconds,
        step_pairs=pairs,
        waiting=pace.accumulated * pace.wait_seconds / step_seconds,
        peak=pace.peak_bytes,
        pair_teraflops=pace.flops / max(pace.rows, 1) / 1e12,
        matmul=pace.matmul,
        utilisation=pace.utilisation,
        steps=steps,
        epoch_seconds=pace.epoch_seconds,
        hours=(steps * step_seconds + epochs * pace.epoch_seconds) / 3600,
        parts=pace.parts.named() if pace.parts else {},
        kept=pace.kept_bytes,
        advice=checkpointing_advice(pace, memory_bytes(pace.device)),
    )


def checkpointing_advice(pace: Pace, memory: int) -> str:
    """Return a sentence if gradient checkpointing can be disabled, or should be enabled.

    Args:
        pace: A finished measurement.
        memory: Bytes of the device; 0 if unknown.
    """
    saved, recomputed = pace.recomputation
    without, key = pace.peak_bytes + saved, "--backbone.gradient_checkpointing"
    if not memory or not saved:
        return ""
    if pace.checkpointed and without < FITS * memory:
        share = recomputed / (pace.flops + recomputed)
        return (
            f"Gradient checkpointing can be disabled: a step would need about {without / GIB:.2f} "
            f"of {memory / GIB:.2f} GiB, and {share:.0%} of its FLOPs are recomputation "
            f"(`{key} false`)."
        )
    if not pace.checkpointed and pace.peak_bytes > FITS * memory:
        return (
            f"Little memory is left: gradient checkpointing would save about {saved / GIB:.2f} of "
            f"{memory / GIB:.2f} GiB, for {recomputed / pace.flops:.0%} more FLOPs "
            f"(`{key} true`)."
        )
    return ""


def print_estimate(found: Estimate) -> None:
    """Print an estimate as tables."""
    whole = f"{found.hours:.3g} h, {found.hours * found.ranks:.3g} device-hours"
    rows = {
        "pairs per second": f"{found.pairs_per_second:.3g}",
        f"an optimizer step of {found.step_pairs} pairs": f"{found.step_seconds:.3g} s",
        "share waiting for data": f"{found.waiting:.1%}",
        "before the first batch of an epoch": f"{found.epoch_seconds:.3g} s",
        "peak memory of a rank": f"{found.peak / GIB:.2f} GiB",
        "encodings kept on the disk, at most": size_in_words(found.kept),
        "FLOPs per pair, recomputation excluded": f"{found.pair_teraflops:.3g} TFLOP",
        f"share of the matmul peak, {found.matmul:.3g} TFLOP/s now": f"{found.utilisation:.1%}",
        f"the recipe's {found.steps} steps": whole if found.steps > 0 else "unlimited",
    }
    table = Table("", f"{found.ranks} x {found.device}", title="Estimated cost")
    for name, value in rows.items():
        table.add_row(name, value)
    sizes = Table("GiB per rank, computed", "", title="Memory by part")
    for name, size in found.parts.items():
        sizes.add_row(name, f"{size / GIB:.3f}")
    sizes.add_row("total", f"{sum(found.parts.values()) / GIB:.3f}")
    console = Console(markup=False)
    console.print(table)
    console.print(sizes)
    if found.advice:
        console.print(found.advice)
    console.print("Validation, checkpoints and evaluation are not included.")

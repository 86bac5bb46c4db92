"""What `released_step.py` measures: a plain script and `lit-prefopt fit`, in the same process."""

from __future__ import annotations

import gc
import os
import re
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.plain import Draws, PlainLoop, PlainPairs, load_networks
from benchmarks.recipes import (
    KINDS,
    Data,
    Family,
    Recipe,
    Train,
    latent_cache,
    pipeline_arguments,
    recipe,
    reference_cache,
)
from benchmarks.step_time import fitted
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.diffusion import draws
from lit_prefopt.toy.backbone import CHECKPOINT
from lit_prefopt.utils.device import peak_bytes, reset_peak, synchronize

RELEASED = "released"
"""The name of the plain script among the forms of the fit's data."""

BETA, RANK, DROPOUT = 5000.0, 16, 0.1
LR, EQUAL_LR = 1e-6, 1e-4  # the second one moves the losses away from ln 2 within a few steps
WARM = 1  # steps of each that are not counted


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float  # of all threads, and of child processes that have ended

    def since(self, start: Cost) -> Cost:
        """Return the difference."""
        return Cost(self.wall - start.wall, self.cpu - start.cpu)


def now() -> Cost:
    """Return the clocks."""
    return Cost(time.perf_counter(), time.process_time() + sum(os.times()[2:4]))


def resident() -> int:
    """Return the bytes of this process in memory, or on a GPU zero."""
    if torch.cuda.is_available():
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Setting(NamedTuple):
    """What is trained, and how."""

    family: Family
    train: Train
    root: Path
    precision: str
    rows: int  # pairs in a batch
    pairs: int
    workers: int
    checkpointing: bool
    options: tuple[str, ...] = ()  # further arguments of the fit

    @property
    def frozen(self) -> str:
        """Precision of all that is not trained."""
        return "bfloat16" if self.precision.startswith("bf16") else "float32"

    @property
    def pipeline(self) -> Path:
        """Folder of the networks."""
        if self.family == "toy":
            return CHECKPOINT
        return Path(pipeline_arguments(self.family, self.root)[1])

    def caches(self, form: Data, folder: Path, visits: int) -> tuple[Path, Path]:
        """Write the caches that a form of the data needs, and return their folders.

        Args:
            form: The form.
            folder: Where they are written.
            visits: Draws of the reference's errors.
        """
        latents, errors = folder / "latents", folder / "errors"
        more = ("--backbone.dtype", self.frozen)
        if form != "images":
            made = {"output": latents, "more": more, "run": lit_prefopt}
            latent_cache(self.family, self.root, self.pairs, **made)  # type: ignore[arg-type]
        if form == "reference":
            precise = (*more, "--trainer.precision", self.precision)
            made = {"output": errors, "more": precise, "run": lit_prefopt, "latents": latents}
            args = (self.family, self.train, self.root, self.pairs, self.rows)
            reference_cache(*args, draws=visits, **made)  # type: ignore[arg-type]
        return latents, errors

    def fit(self, form: Data, caches: tuple[Path, Path], lr: float = LR) -> Recipe:
        """Return the arguments of `fit`, on images or on caches."""
        known: dict[str, Any] = {"batch": self.rows, "pairs": self.pairs, "workers": self.workers}
        made = recipe(self.family, self.train, form, self.root, caches=caches, **known)
        doubled = str(self.checkpointing).lower()
        arguments = [
            *made.arguments,
            *("--backbone.dtype", self.frozen, "--trainer.precision", self.precision),
            *("--backbone.gradient_checkpointing", doubled, "--model.optimizer.lr", str(lr)),
        ]
        if form == "images":
            arguments += ["--data.flip", "false"]
        else:
            arguments += ["--backbone.encoders", "false"]
        if form == "reference":
            arguments += ["--backbone.reference", "none"]
        return made._replace(arguments=[*arguments, *self.options])


class Script:
    """The plain script, with networks and data of its own.

    Args:
        setting: What is trained.
        device: Where.
        lr: Learning rate.
    """

    def __init__(self, setting: Setting, device: torch.device, lr: float = LR) -> None:
        mixed = setting.precision.startswith("bf16")
        rank = RANK if setting.train == "lora" else None
        networks = load_networks(
            setting.pipeline,
            getattr(torch, setting.frozen),
            device,
            rank=rank,
            checkpointing=setting.checkpointing,
        )

        def context() -> AbstractContextManager[Any]:
            return torch.autocast(device.type, torch.bfloat16, enabled=mixed)

        optimizer = torch.optim.AdamW(networks.trained.values(), lr)
        self.loop = PlainLoop(networks, optimizer, BETA, context, nullcontext)
        shards = fit_shards(setting)
        self.pairs = PlainPairs(shards, KINDS[setting.family].resolution, DROPOUT)
        pinned = device.type == "cuda"
        self.batches = self.pairs.batches(setting.rows, setting.workers, pinned=pinned)

    def step(self) -> float:
        """Read a batch, train on it and return the loss."""
        images, texts = next(self.batches)
        return self.loop.step(images, texts)


def fit_shards(setting: Setting) -> Path:
    """Return the folder of image shards that both read."""
    nowhere = (Path(), Path())
    return setting.fit("images", nowhere).shards


class Rounds(Callback):
    """Takes steps of the plain script after as many of the fit, and the cost of all.

    Its class holds what it cannot get from a recipe.
    """

    setting: ClassVar[Setting]
    steps: ClassVar[int]
    costs: ClassVar[dict[str, list[Cost]]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the plain script up."""
        self.device = trainer.strategy.root_device
        self.script = Script(Rounds.setting, self.device)
        Rounds.costs = {RELEASED: [], "fit": []}
        self.since = now()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note a step of the fit, and after a round of them take the plain script's."""
        self._note("fit")
        done = len(Rounds.costs["fit"])
        if done == WARM:
            self._take(WARM)
        elif (done - WARM) % Rounds.steps == 0:
            self._take(Rounds.steps)

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            self.script.step()
            self._note(RELEASED)

    def _note(self, whose: str) -> None:
        synchronize(self.device)
        Rounds.costs[whose].append(now().since(self.since))
        self.since = now()


def take_rounds(
    setting: Setting, form: Data, caches: tuple[Path, Path], rounds: int, steps: int
) -> dict[str, list[list[Cost]]]:
    """Return the costs of the steps of plain script and fit, by round.

    Args:
        setting: What is trained.
        form: Form of the fit's data.
        caches: Its folders.
        rounds: How often the two take turns.
        steps: Of each in a round.
    """
    Rounds.setting, Rounds.steps = setting, steps
    arguments = setting.fit(form, caches).arguments
    fitted(
        arguments,
        WARM + rounds * steps,
        ["--trainer.callbacks+", "benchmarks.released_runs.Rounds"],
    )
    return {
        whose: [costs[i : i + steps] for i in range(WARM, len(costs), steps)]
        for whose, costs in Rounds.costs.items()
    }


class Step(NamedTuple):
    """A step of the fit, to be taken again by the plain script."""

    keys: list[str]
    texts: list[str]
    draws: Draws
    loss: float


class Recorder(Callback):
    """Records the draws and losses of all steps, and the trained weights before and after."""

    steps: ClassVar[list[Step]]
    images: ClassVar[list[Tensor]]  # of a fit from images
    before: ClassVar[dict[str, Tensor]]
    after: ClassVar[dict[str, Tensor]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights."""
        Recorder.steps, Recorder.images = [], []
        Recorder.before = _trained(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep a step."""
        module: Any = pl_module
        backbone, seeds = module.backbone, batch.seeds
        sides = batch.images if hasattr(batch, "images") else batch.mean
        if hasattr(batch, "images"):
            Recorder.images.append(batch.scaled().images)
            side = sides.shape[-1] // backbone.pixels_per_latent
        else:
            side = sides.shape[-1]
        shape, device = (backbone.latent_shape[0], side, side), sides.device
        u = module.level_quantiles(draws.uniform(seeds, "t"))
        drawn = Draws(
            draws.normal(seeds, shape, "vae", device),
            draws.normal(seeds, shape, "noise", device),
            backbone.process.draw_levels(u, shape).to(device),
        )
        Recorder.steps.append(Step(batch.keys, batch.texts, drawn, float(outputs["loss"])))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights."""
        Recorder.after = _trained(pl_module)


def _trained(module: Any) -> dict[str, Tensor]:
    unet = module.backbone.policy.denoiser
    return {n: p.detach().clone() for n, p in unet.named_parameters() if p.requires_grad}


class Equal(NamedTuple):
    """A fit and the plain script under the same draws."""

    fit: list[float]  # losses
    released: list[float]
    weights: float  # largest difference at the end
    moved: float  # largest change of a weight of the fit


def compare_losses(
    setting: Setting,
    form: Data,
    caches: tuple[Path, Path],
    steps: int,
    images: list[Tensor] | None = None,
) -> tuple[Equal, list[Tensor]]:
    """Take the steps of a fit again with the plain script, and return both and the images.

    Args:
        setting: What is trained.
        form: Form of the fit's data.
        caches: Its folders.
        steps: How many.
        images: What a fit from images read, if this one does not.
    """
    arguments = setting.fit(form, caches, EQUAL_LR).arguments
    fitted(arguments, steps, ["--trainer.callbacks+", "benchmarks.released_runs.Recorder"])
    images = images if images is not None else Recorder.images
    device = images[0].device
    script = Script(setting, device, EQUAL_LR)
    trained = {name: p.detach() for name, p in script.loop.networks.trained.items()}
    if trained.keys() != Recorder.before.keys():
        raise RuntimeError(f"Other weights are trained: {trained.keys() ^ Recorder.before.keys()}")
    for name, weight in trained.items():
        weight.copy_(Recorder.before[name])
    losses = [
        script.loop.step(pixels, step.texts, step.draws)
        for pixels, step in zip(images, Recorder.steps, strict=True)
    ]
    apart = max(float((w - Recorder.after[n]).abs().max()) for n, w in trained.items())
    moved = max(float((Recorder.before[n] - w).abs().max()) for n, w in Recorder.after.items())
    return Equal([step.loss for step in Recorder.steps], losses, apart, moved), images


class Peak(Callback):
    """Takes the peak memory of all steps after the first ones."""

    bytes: ClassVar[int]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Reset the peak after the first steps."""
        if trainer.global_step == WARM:
            reset_peak(trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read it."""
        Peak.bytes = peak_bytes(trainer.strategy.root_device)


def peak_alone(setting: Setting, form: str, caches: tuple[Path, Path], steps: int) -> int:
    """Return the peak bytes of this process in some steps of the plain script or the fit."""
    if form != RELEASED:
        arguments = setting.fit(form, caches).arguments  # type: ignore[arg-type]
        callback = ["--trainer.callbacks+", "benchmarks.released_runs.Peak"]
        fitted(arguments, WARM + steps, callback)
        return Peak.bytes
    device = default_device()
    script = Script(setting, device)
    for step in range(WARM + steps):
        if step == WARM:
            reset_peak(device)
        script.step()
    return peak_bytes(device)


def whole_run(setting: Setting, form: str, visits: int) -> Cost:
    """Return the cost of a run of so many visits of each pair, preparation of caches included.

    Args:
        setting: What is trained.
        form: The plain script, or the form of the fit's data.
        visits: Of each pair; the reference's errors are computed at as many draws.
    """
    shards = fit_shards(setting)  # written before the clock runs
    steps = visits * len(PlainPairs(shards, 1)) // setting.rows
    gc.collect()
    start = now()
    if form == RELEASED:
        script = Script(setting, default_device())
        for _ in range(steps):
            script.step()
    else:
        with TemporaryDirectory(dir=setting.root) as folder:
            caches = setting.caches(form, Path(folder), visits)  # type: ignore[arg-type]
            fitted(setting.fit(form, caches).arguments, steps, [])  # type: ignore[arg-type]
    synchronize(default_device())
    return now().since(start)


def default_device() -> torch.device:
    """Return the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

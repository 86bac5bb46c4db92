"""The recipes that are measured: one family, one way to train, one form of the data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from benchmarks.common import random_sd15, random_sdxl, random_shards
from lit_prefopt.toy.backbone import CHECKPOINT
from lit_prefopt.toy.pairs import PAIRS
from tests.helpers.full_size import write_configs
from tests.helpers.tiny import tiny_pipeline, tiny_xl_pipeline
from tests.helpers.tiny_sd3 import tiny_sd35_pipeline

Family = Literal["tiny", "tiny-xl", "tiny-sd35", "toy", "sd15", "sdxl", "sd35"]
Train = Literal["full", "lora"]
Data = Literal["images", "cached", "reference"]
Run = Callable[[list[str]], None]
"""Runs a command of lit-prefopt."""


class Kind(NamedTuple):
    """How a family's recipe is made."""

    method: str  # a shipped recipe
    backbone: str  # of a full fine-tune: a part's name or a class
    lora: str  # likewise
    caches: str  # the shipped recipes of its caches begin with this
    make: Callable[[Path], Path]  # writes a pipeline with random weights, once
    resolution: int  # pixels
    batch: int  # pairs
    precision: str


def _once(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda folder: folder if (folder / "model_index.json").is_file() else make(folder)


TINY, TINY_XL = _once(tiny_pipeline), _once(tiny_xl_pipeline)
TINY_SD35, SD35_MEDIUM = _once(tiny_sd35_pipeline), partial(write_configs, "sd35-medium")
SD15, SDXL, SD3 = "sd15-diffusion-dpo", "sdxl-diffusion-dpo", "sd35-diffusion-dpo"
OF_SD15 = ("backbone/sd15.yaml", "backbone/sd15-lora.yaml")
OF_SDXL = ("backbone/sdxl.yaml", "backbone/sdxl-lora.yaml")
OF_SD35 = ("backbone/sd35.yaml", "backbone/sd35-lora.yaml")
TOY = "ToyDiffusion"
KINDS: dict[str, Kind] = {
    "tiny": Kind(SD15, *OF_SD15, "sd15", TINY, 32, 4, "32-true"),
    "tiny-xl": Kind(SDXL, *OF_SDXL, "sdxl", TINY_XL, 32, 4, "32-true"),
    "tiny-sd35": Kind(SD3, *OF_SD35, "sd35", TINY_SD35, 32, 4, "32-true"),
    "toy": Kind("toy-diffusion-dpo", TOY, TOY, "toy", lambda _: CHECKPOINT, 32, 16, "32-true"),
    "sd15": Kind(SD15, *OF_SD15, "sd15", random_sd15, 512, 1, "bf16-mixed"),
    "sdxl": Kind(SDXL, *OF_SDXL, "sdxl", random_sdxl, 1024, 1, "bf16-mixed"),
    "sd35": Kind(SD3, *OF_SD35, "sd35", SD35_MEDIUM, 512, 1, "bf16-mixed"),  # without weights
}


class Recipe(NamedTuple):
    """Arguments of `lit-prefopt fit`, and the settings that a plain loop needs."""

    arguments: list[str]
    shards: Path
    resolution: int
    batch: int
    precision: str


def image_shards(family: Family, root: Path, pairs: int) -> Path:
    """Return a folder of image shards: the toy world's own, or such as are made."""
    if family == "toy":
        return PAIRS / "train"
    side = KINDS[family].resolution
    return random_shards(root / f"shards-{side}-{pairs}", pairs, side)


def latent_cache(
    family: Family,
    root: Path,
    pairs: int,
    *,
    output: Path | None = None,
    more: Sequence[str] = (),
    run: Run | None = None,
) -> Path:
    """Return a folder of the same pairs as latents and embedded prompts, made once.

    Args:
        family: The model.
        root: Where its pipeline and the shards are.
        pairs: In the shards.
        output: The folder; by default one in `root`.
        more: Further arguments.
        run: Runs the command; by default in a process of its own.
    """
    made = output or root / f"{family}-cache-{pairs}"
    kind, shards = KINDS[family], image_shards(family, root, pairs)
    own = [] if family == "toy" else ["--data.shards", str(shards), "--model.flip", "false"]
    own += ["--model.resolution", str(kind.resolution), *pipeline_arguments(family, root), *more]
    _predict(f"{kind.caches}-cache", made, own, run)
    return made


def reference_cache(
    family: Family,
    train: Train,
    root: Path,
    pairs: int,
    rows: int,
    *,
    bf16_weights: bool = False,
    latents: Path | None = None,
    output: Path | None = None,
    draws: int = 2,
    more: Sequence[str] = (),
    run: Run | None = None,
) -> Path:
    """Return a folder of the reference's errors at some draws of those pairs, made once.

    Args:
        family: The model.
        train: All weights of the denoiser, or a LoRA.
        root: Where its pipeline and the shards are.
        pairs: In the shards.
        rows: Pairs at a time.
        bf16_weights: Whether all weights of the denoiser are trained in bfloat16.
        latents: Folder of the pairs' latents; by default that of `latent_cache`.
        output: The folder; by default one in `root`.
        draws: Of each pair.
        more: Further arguments.
        run: Runs the command; by default in a process of its own.
    """
    name = f"{family}-{'bf16_weights' if bf16_weights else train}-reference-{pairs}-{rows}"
    made, kind = output or root / name, KINDS[family]
    shards = latents or latent_cache(family, root, pairs)
    own = ["--data.shards", str(shards), "--model.draws", str(draws)]
    own += ["--model.caption_dropout", "0.1", "--model.batch_size", str(rows)]
    own += ["--trainer.precision", kind.precision]
    if train == "lora":  # whose precision the reference then has
        own += ["--backbone", kind.lora, "--backbone.lora.rank", "16"]
        own += ["--backbone.encoders", "false"]
    if bf16_weights:
        own += ["--backbone.policy_dtype", "bfloat16"]
    own += [*pipeline_arguments(family, root), *more]
    _predict(f"{kind.caches}-reference-cache", made, own, run)
    return made


def pipeline_arguments(family: Family, root: Path) -> list[str]:
    """Return the arguments that name the family's pipeline, which is written once."""
    if family == "toy":
        return []
    pipeline = str(KINDS[family].make(root / family))
    return ["--backbone.pretrained", pipeline, "--backbone.vae", pipeline]


def _predict(config: str, output: Path, own: list[str], run: Run | None) -> None:
    """Run a generator, unless its output is there and whole."""
    (run or _in_a_process)(["predict", "--config", config, "--model.output", str(output), *own])


def _in_a_process(command: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "lit_prefopt.cli", *command], check=True)


def recipe(
    family: Family,
    train: Train,
    data: Data,
    root: Path,
    *,
    batch: int | None = None,
    workers: int = 0,
    pairs: int = 64,
    bf16_weights: bool = False,
    caches: tuple[Path, Path] | None = None,
) -> Recipe:
    """Return a recipe with one batch an optimizer step and nothing beside the steps.

    The optimizer is plain AdamW, unless all weights are bfloat16.

    Args:
        family: The model.
        train: All weights of the denoiser, or a LoRA of rank 16.
        data: Its form.
        root: Where pipelines and shards are written.
        batch: Pairs in a batch; by default the family's own number.
        workers: Processes that read and decode.
        pairs: In the shards.
        bf16_weights: Whether all weights of the denoiser are trained in bfloat16, by AdamW8bit.
        caches: Folders of latents and of the reference's errors; made if not given.
    """
    kind, rows = KINDS[family], batch or KINDS[family].batch
    shards = image_shards(family, root, pairs)
    arguments = ["--config", kind.method]
    if family != "toy":
        name = kind.lora if train == "lora" else kind.backbone
        arguments += ["--backbone", name, *pipeline_arguments(family, root)]
    if data == "images":
        arguments += ["--data", "PairShards", "--data.shards", str(shards)]
        # every step encodes: `fit_caches.py` measures what is stored
        arguments += ["--data.resolution", str(kind.resolution), "--data.keep_encodings", "false"]
    else:
        latents = caches[0] if caches else latent_cache(family, root, pairs)
        arguments += ["--data", "CachedPairs", "--data.shards", str(latents)]
    if data == "reference":
        known = (
            caches[1]
            if caches
            else reference_cache(family, train, root, pairs, rows, bf16_weights=bf16_weights)
        )
        arguments += ["--data.reference", str(known)]
    if train == "lora":
        arguments += ["--backbone.lora.rank", "16"]
    optimizer = ["AdamW"]
    if bf16_weights:
        arguments += ["--backbone.policy_dtype", "bfloat16"]
        optimizer = ["AdamW8bit", "--model.optimizer.stochastic_rounding", "true"]
    arguments += [
        *("--data.batch_size", str(rows), "--data.workers", str(workers)),
        *("--data.caption_dropout", "0.1", "--model.optimizer", *optimizer),
        *("--model.optimizer.lr", "1e-6", "--model.optimizer.warmup_steps", "0"),
        *("--trainer.precision", kind.precision, "--batch.pairs", str(rows)),
        *("--trainer.accelerator", "auto", "--trainer.limit_val_batches", "0"),
        *("--trainer.gradient_clip_val", "1.0", "--trainer.enable_model_summary", "false"),
    ]
    return Recipe(arguments, shards, kind.resolution, rows, kind.precision)


def dtype_of(kind: Kind) -> torch.dtype:
    """Return what most of a family's matrix products run in."""
    return torch.bfloat16 if kind.precision.startswith("bf16") else torch.float32

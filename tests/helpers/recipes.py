"""Recipes small enough for a test."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

SMALL = str(Path(__file__).with_name("small.yaml"))
"""Recipe with the callbacks of a small run."""

OWN_COUNTS = [
    *("--batch.pairs", "null", "--batch.validate_every", "null"),
    *("--trainer.check_val_every_n_epoch", "null"),
]
"""Arguments by which a test counts in batches, with the Trainer's own keys."""

LORA_WEIGHTS = Path("weights") / "pytorch_lora_weights.safetensors"
"""File of the LoRA in the folder of a run."""


def on_cpu(pipeline: str | Path) -> list[str]:
    """Return what makes a recipe run on a CPU: the model, the precision, the device.

    Args:
        pipeline: Folder of a small pipeline.
    """
    return [
        *("--backbone.pretrained", str(pipeline), "--backbone.dtype", "float32"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--trainer.enable_progress_bar", "false"),
    ]


def two_steps(folder: Path) -> list[str]:
    """Return the arguments of a run of two steps.

    Args:
        folder: Folder of the run.
    """
    return [
        *("--config", SMALL, "--trainer.default_root_dir", str(folder)),
        *("--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
    ]


def on_pairs(shards: str, batch_size: int = 2) -> list[str]:
    """Return the arguments of a run on pairs or their cache, of two batches a step.

    Args:
        shards: Folder of the pairs.
        batch_size: Pairs in a batch.
    """
    return [
        *("--data.shards", shards, "--data.validation", "null", "--data.workers", "0"),
        *("--data.batch_size", str(batch_size), "--batch.pairs", str(2 * batch_size)),
        *("--batch.validate_every", "2"),
    ]


WITHOUT_ENCODERS = [
    *("--data", "CachedPairs", "--backbone.encoders", "false"),
    *("--trainer.callbacks", "Checkpoints"),
]
"""Arguments of a run on a cache, without VAE and text encoders, which grids of samples need."""


def check_began_at_ln_2(logged: dict[str, list[float]]) -> None:
    """Check that a run of two steps began at loss ln 2 with margin 0, and moved.

    Args:
        logged: What it logged, by name.
    """
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/margin"][0] == 0
    assert logged["train/margin"][1] != 0


def small_recipe(
    pipeline: str, shards: str, folder: Path, name: str = "toy-diffusion-dpo"
) -> list[str]:
    """Return the arguments of a small run on a pipeline with random weights.

    Args:
        pipeline: Folder of the pipeline.
        shards: Folder of the pairs.
        folder: Folder of the run.
        name: Name of the shipped recipe.
    """
    return [
        *("--config", name, "--config", SMALL),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", pipeline),
        *("--data", "PairShards", "--data.shards", shards, "--data.validation", shards),
        *("--data.batch_size", "4", "--data.resolution", "32", "--data.workers", "0"),
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", *OWN_COUNTS),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    ]

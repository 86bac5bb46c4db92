"""Recipes small enough for a test."""

from __future__ import annotations

from pathlib import Path


def small_recipe(pipeline: str, shards: str, folder: Path) -> list[str]:
    """Return the arguments of a small run on a pipeline with random weights."""
    return [
        *("--config", "toy-diffusion-dpo"),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", pipeline),
        *("--data", "PairShards", "--data.shards", shards, "--data.validation", shards),
        *("--data.batch_size", "4", "--data.resolution", "32", "--data.workers", "0"),
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2"),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    ]

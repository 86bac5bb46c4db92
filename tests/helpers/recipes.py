"""Recipes small enough for a test."""

from __future__ import annotations

from pathlib import Path

SMALL = str(Path(__file__).with_name("small.yaml"))
"""Recipe with the callbacks of a small run."""

OWN_COUNTS = [
    *("--batch.pairs", "null", "--batch.validate_every", "null"),
    *("--trainer.check_val_every_n_epoch", "null"),
]
"""Arguments by which a test counts in batches, with the Trainer's own keys."""


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

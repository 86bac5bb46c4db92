"""Small caches of the random pairs, made as `predict` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.datamodules import CachedGroups, CachedPairs, SampleGroups
from lit_prefopt.datamodules.generation import GenerationDataModule
from lit_prefopt.generate import LatentCache, ReferenceErrors
from lit_prefopt.generate.producer import Producer
from tests.helpers.recipes import OWN_COUNTS, SMALL
from tests.helpers.runs import same

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run(model: Producer, groups: GenerationDataModule) -> Path:
    """Run a generator and return its output."""
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], **QUIET)
    trainer.predict(model, groups, return_predictions=False)
    return model.output


def cache(backbone: Backbone, shards: str, output: Path, **options: Any) -> str:
    """Cache pairs at 32 x 32 pixels and return the folder."""
    model = LatentCache(backbone, str(output), **{"resolution": 32, "batch_size": 8} | options)
    return str(run(model, SampleGroups(shards, group_size=5)))


def cache_again(backbone: Backbone, cached: str, output: Path, **options: Any) -> str:
    """Cache the latents of a cache with another model's prompts, and return the folder."""
    model = LatentCache(backbone, str(output), **{"resolution": 32, "batch_size": 8} | options)
    return str(run(model, CachedGroups(cached, group_size=5)))


def errors(backbone: Backbone, cached: str, output: Path, **options: Any) -> str:
    """Compute reference errors of cached pairs and return the folder."""
    model = ReferenceErrors(backbone, str(output), **{"draws": 2, "batch_size": 4} | options)
    return str(run(model, CachedGroups(cached, group_size=5)))


def data(cached: str, **options: Any) -> CachedPairs:
    """Return a data module that is set up."""
    module = CachedPairs(cached, **{"batch_size": 4, "workers": 0, "seed": 1} | options)
    module.setup("fit")
    return module


def frozen(folder: str, **options: Any) -> StableDiffusion:
    """Return a backbone that only listens."""
    return StableDiffusion(folder, reference="none", **options)


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two runs ended in the same weights, optimizer and schedule."""
    a, b = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)
    )
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(a[key], b[key]), key
    assert a["state_dict"]


def logged(run: Path) -> dict[str, list[float]]:
    """Everything that was logged, by name."""
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def on(kind: str, shards: str, workers: int = 0) -> list[str]:
    """Return what a run is to read."""
    given = ["--data", kind, "--data.shards", shards, "--data.validation", shards]
    return [*given, "--data.workers", str(workers)]


def recipe(pipeline: str, folder: Path, *data: str) -> list[str]:
    """Return the arguments of a small run."""
    return [
        *("--config", "toy-diffusion-dpo", "--config", SMALL),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", pipeline),
        *("--data.batch_size", "4", "--data.caption_dropout", "0.2", *data),
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.max_steps", "4", *OWN_COUNTS, "--trainer.val_check_interval", "4"),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    ]

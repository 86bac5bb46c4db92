"""The recipes of FLUX.1 from pairs and caches to weights, very small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.recipes import SMALL
from tests.helpers.runs import scalars
from tests.helpers.tiny_flux1 import tiny_flux1_pipeline

WEIGHTS = Path("weights") / "pytorch_lora_weights.safetensors"
DPO = "flux1-diffusion-dpo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_flux1_pipeline(tmp_path_factory.mktemp("flux1")))


def common(folder: str) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    return [
        *("--backbone.pretrained", folder, "--backbone.dtype", "float32"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--trainer.enable_progress_bar", "false"),
    ]


def of_a_run(run: Path, shards: str) -> list[str]:
    """Arguments of a run of two steps, two pairs a step, one at a time.

    VAE and text encoders round in another way alone than in a batch of several, so that a cache
    that is compared has as many at a time as the training: a pair, or the chosen side.
    """
    return [
        *("--config", SMALL, "--trainer.default_root_dir", str(run)),
        *("--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
        *("--data.shards", shards, "--data.validation", "null", "--data.workers", "0"),
        *("--data.batch_size", "1", "--batch.pairs", "2", "--batch.validate_every", "2"),
    ]


@pytest.mark.parametrize(("name", "sides"), [(DPO, 2), ("flux1-sft", 1)])
def test_a_training_from_images_and_from_a_cache(
    name: str, sides: int, folder: str, shards: str, tmp_path: Path
) -> None:
    """The same losses, bit for bit, without VAE and text encoders."""
    cache, small = str(tmp_path / "cache"), common(folder)
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    making += ["--data.group_size", "1", "--model.batch_size", str(sides)]
    main(["predict", "--config", "flux1-cache", *small, *making])
    images, cached = tmp_path / "images", tmp_path / "cached"
    main(["fit", "--config", name, *small, *of_a_run(images, shards), "--data.resolution", "32"])
    without = ["--data", "CachedPairs", *of_a_run(cached, cache), "--backbone.encoders", "false"]
    without += ["--trainer.callbacks", "Checkpoints"]
    main(["fit", "--config", name, *small, *without])
    logged, again = scalars(images), scalars(cached)
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    if sides == 2:
        assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged["train/margin"][0] == 0
        assert logged["train/margin"][1] != 0
    else:
        assert logged["train/loss"] == logged["train/error"]
    assert any(".lora_B." in key for key in load_file(images / WEIGHTS))


def test_a_training_from_cached_reference_errors(folder: str, shards: str, tmp_path: Path) -> None:
    """The guidance scale of the training is that of the table."""
    cache, table, small = str(tmp_path / "cache"), str(tmp_path / "errors"), common(folder)
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    main(["predict", "--config", "flux1-cache", *small, *making])
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "flux1-reference-cache", *small, *errors])
    arguments = ["--data", "CachedPairs", *of_a_run(tmp_path / "run", cache)]
    arguments += ["--data.reference", table, "--backbone.encoders", "false"]
    arguments += ["--trainer.callbacks", "Checkpoints"]
    main(["fit", "--config", DPO, *small, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0
    with pytest.raises(SystemExit, match="The reference's errors in .* differ .* in guidance"):
        main(["fit", "--config", DPO, *small, *arguments, "--backbone.guidance", "3.5"])

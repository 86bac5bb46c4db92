"""The recipes of Qwen-Image from pairs and caches to weights, very small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.recipes import SMALL
from tests.helpers.runs import scalars
from tests.helpers.tiny_qwen_image import tiny_qwen_image_pipeline

WEIGHTS = Path("weights") / "pytorch_lora_weights.safetensors"
NAMES = ("qwen-image-diffusion-dpo", "qwen-image-sft")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    folder = str(tiny_qwen_image_pipeline(tmp_path_factory.mktemp("qwen-image"), factor=4))
    return [
        *("--backbone.pretrained", folder, "--backbone.dtype", "float32"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--trainer.enable_progress_bar", "false"),
    ]


@pytest.fixture(scope="module")
def cache(small: list[str], shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of cached pairs, encoded four images at a time, as those of two pairs in training.

    On a CPU the last bits of three-dimensional convolutions depend on the size of the batch.
    """
    output = str(tmp_path_factory.mktemp("cache") / "pairs")
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", output]
    making += ["--model.batch_size", "4"]
    main(["predict", "--config", "qwen-image-cache", *small, *making])
    return output


def of_a_run(run: Path, shards: str) -> list[str]:
    """Arguments of a run of two steps, four pairs a step."""
    return [
        *("--config", SMALL, "--trainer.default_root_dir", str(run)),
        *("--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
        *("--data.shards", shards, "--data.validation", "null", "--data.workers", "0"),
        *("--data.batch_size", "2", "--batch.pairs", "4", "--batch.validate_every", "2"),
    ]


def of_a_cache(run: Path, cache: str) -> list[str]:
    """Arguments of a run of two steps on a cache, without VAE and text encoder."""
    return [
        *("--data", "CachedPairs", *of_a_run(run, cache), "--backbone.encoders", "false"),
        *("--trainer.callbacks", "Checkpoints"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_training_from_images_and_from_a_cache(
    name: str, small: list[str], shards: str, cache: str, tmp_path: Path
) -> None:
    """The same losses in every bit, of prompts of two lengths without padding in the cache."""
    fit = ["fit", "--config", name, *small]
    main([*fit, *of_a_run(tmp_path / "images", shards), "--data.resolution", "32"])
    main([*fit, *of_a_cache(tmp_path / "cached", cache)])
    logged, again = (scalars(tmp_path / run) for run in ("images", "cached"))
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    weights = load_file(tmp_path / "images" / WEIGHTS)
    assert weights
    assert all(x.any() for x in weights.values())
    if name == NAMES[0]:
        assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged["train/margin"][0] == 0
        assert logged["train/margin"][1] != 0
    else:
        assert logged["train/loss"][0] == logged["train/error"][0]


def test_a_training_from_cached_reference_errors(
    small: list[str], cache: str, tmp_path: Path
) -> None:
    table = str(tmp_path / "errors")
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "qwen-image-reference-cache", *small, *errors])
    arguments = [*of_a_cache(tmp_path / "run", cache), "--data.reference", table]
    main(["fit", "--config", NAMES[0], *small, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0

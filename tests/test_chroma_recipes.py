"""The recipes of Chroma from pairs and caches to weights, very small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.recipes import (
    LORA_WEIGHTS,
    WITHOUT_ENCODERS,
    check_began_at_ln_2,
    on_cpu,
    on_pairs,
    two_steps,
)
from tests.helpers.runs import scalars
from tests.helpers.tiny_chroma import tiny_chroma_pipeline

DPO = "chroma-diffusion-dpo"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    return on_cpu(str(tiny_chroma_pipeline(tmp_path_factory.mktemp("chroma"))))


@pytest.fixture(scope="module")
def cache(small: list[str], shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Latents and prompts of the pairs, of which each is encoded alone as in the training."""
    folder = str(tmp_path_factory.mktemp("chroma") / "cache")
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", folder]
    making += ["--data.group_size", "1", "--model.batch_size", "2"]
    main(["predict", "--config", "chroma-cache", *small, *making])
    return folder


def test_a_training_from_images_and_from_a_cache(
    small: list[str], shards: str, cache: str, tmp_path: Path
) -> None:
    """The same losses, bit for bit, without VAE and text encoder."""
    images, cached = tmp_path / "images", tmp_path / "cached"
    pairs = [*on_pairs(shards, batch_size=1), "--data.resolution", "32"]
    main(["fit", "--config", DPO, *small, *two_steps(images), *pairs])
    pairs = [*WITHOUT_ENCODERS, *on_pairs(cache, batch_size=1)]
    main(["fit", "--config", DPO, *small, *two_steps(cached), *pairs])
    logged, again = scalars(images), scalars(cached)
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    check_began_at_ln_2(logged)
    assert any(".lora_B." in key for key in load_file(images / LORA_WEIGHTS))


def test_supervised_fine_tuning(small: list[str], cache: str, tmp_path: Path) -> None:
    arguments = [*two_steps(tmp_path), *WITHOUT_ENCODERS, *on_pairs(cache, batch_size=1)]
    main(["fit", "--config", "chroma-sft", *small, *arguments])
    logged = scalars(tmp_path)
    assert len(logged["train/loss"]) == 2
    assert logged["train/loss"] == logged["train/error"]


def test_a_training_from_cached_reference_errors(
    small: list[str], cache: str, tmp_path: Path
) -> None:
    """The checkpointed policy begins where the reference is, which nothing checkpoints."""
    table = str(tmp_path / "errors")
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "chroma-reference-cache", *small, *errors])
    arguments = [*two_steps(tmp_path / "run"), *WITHOUT_ENCODERS, *on_pairs(cache, batch_size=1)]
    main(["fit", "--config", DPO, *small, *arguments, "--data.reference", table])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0

"""The recipes of Qwen-Image from pairs and caches to weights, very small."""

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
from tests.helpers.tiny_qwen_image import tiny_qwen_image_pipeline

NAMES = ("qwen-image-diffusion-dpo", "qwen-image-sft")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    folder = str(tiny_qwen_image_pipeline(tmp_path_factory.mktemp("qwen-image"), factor=4))
    return on_cpu(folder)


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


@pytest.mark.parametrize("name", NAMES)
def test_a_training_from_images_and_from_a_cache(
    name: str, small: list[str], shards: str, cache: str, tmp_path: Path
) -> None:
    """The same losses in every bit, of prompts of two lengths without padding in the cache."""
    fit = ["fit", "--config", name, *small]
    main([*fit, *two_steps(tmp_path / "images"), *on_pairs(shards), "--data.resolution", "32"])
    main([*fit, *two_steps(tmp_path / "cached"), *WITHOUT_ENCODERS, *on_pairs(cache)])
    logged, again = (scalars(tmp_path / run) for run in ("images", "cached"))
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    weights = load_file(tmp_path / "images" / LORA_WEIGHTS)
    assert weights
    assert all(x.any() for x in weights.values())
    if name == NAMES[0]:
        check_began_at_ln_2(logged)
    else:
        assert logged["train/loss"][0] == logged["train/error"][0]


def test_a_training_from_cached_reference_errors(
    small: list[str], cache: str, tmp_path: Path
) -> None:
    table = str(tmp_path / "errors")
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "qwen-image-reference-cache", *small, *errors])
    arguments = [
        *two_steps(tmp_path / "run"),
        *WITHOUT_ENCODERS,
        *on_pairs(cache),
        "--data.reference",
        table,
    ]
    main(["fit", "--config", NAMES[0], *small, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0

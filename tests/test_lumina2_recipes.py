"""The recipes of Lumina Image 2.0 from pairs and caches to weights, very small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from diffusers import Lumina2Pipeline
from safetensors.torch import load_file

from lit_prefopt.cli import main
from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.shards.index import read_index
from tests.helpers.recipes import (
    LORA_WEIGHTS,
    WITHOUT_ENCODERS,
    check_began_at_ln_2,
    on_cpu,
    on_pairs,
    two_steps,
)
from tests.helpers.runs import scalars
from tests.helpers.tiny_lumina2 import tiny_lumina2_pipeline

NAMES = ("lumina2-diffusion-dpo", "lumina2-sft")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    folder = tiny_lumina2_pipeline(tmp_path_factory.mktemp("lumina2"))
    return on_cpu(folder)


@pytest.fixture(scope="module")
def cache(small: list[str], shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Latents and prompts of the pairs."""
    folder = str(tmp_path_factory.mktemp("lumina2") / "cache")
    making = ["--model.resolution", "64", "--data.shards", shards, "--model.output", folder]
    # as many images at a time as in training: the VAE rounds those of larger batches otherwise
    making += ["--model.batch_size", "4"]
    main(["predict", "--config", "lumina2-cache", *small, *making])
    return folder


def test_prompts_are_cached_without_padding(cache: str) -> None:
    """Each with the system prompt before it."""
    reader = LatentReader(read_index(cache))
    kept = [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]
    assert kept
    before = f"{Lumina2Pipeline(*[None] * 5).system_prompt} <Prompt Start> "
    for one in kept:
        length = min(1 + len(before) + len(one.text), 256)  # a token for the beginning
        assert one.prompt["hidden"].shape == (length, 16)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_from_images_and_from_a_cache(
    name: str, small: list[str], shards: str, cache: str, tmp_path: Path
) -> None:
    """The same losses, bit for bit, without VAE and text encoders."""
    images, cached = tmp_path / "images", tmp_path / "cached"
    main(
        [
            "fit",
            "--config",
            name,
            *small,
            *two_steps(images),
            *on_pairs(shards),
            "--data.resolution",
            "64",
        ]
    )
    main(["fit", "--config", name, *small, *two_steps(cached), *WITHOUT_ENCODERS, *on_pairs(cache)])
    logged, again = scalars(images), scalars(cached)
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    assert any(".lora_B." in key for key in load_file(images / LORA_WEIGHTS))
    if name == "lumina2-sft":
        assert logged["train/loss"][0] == logged["train/error"][0]
    else:
        check_began_at_ln_2(logged)


def test_a_training_from_cached_reference_errors(
    small: list[str], cache: str, tmp_path: Path
) -> None:
    table = str(tmp_path / "errors")
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "lumina2-reference-cache", *small, *errors])
    arguments = [*two_steps(tmp_path / "run"), *WITHOUT_ENCODERS, *on_pairs(cache)]
    arguments += ["--data.reference", table]
    main(["fit", "--config", NAMES[0], *small, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0

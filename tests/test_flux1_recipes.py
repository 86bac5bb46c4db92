"""The recipes of FLUX.1 from pairs and caches to weights, very small."""

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
from tests.helpers.tiny_flux1 import tiny_flux1_pipeline

DPO = "flux1-diffusion-dpo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_flux1_pipeline(tmp_path_factory.mktemp("flux1")))


@pytest.mark.parametrize(("name", "sides"), [(DPO, 2), ("flux1-sft", 1)])
def test_a_training_from_images_and_from_a_cache(
    name: str, sides: int, folder: str, shards: str, tmp_path: Path
) -> None:
    """The same losses, bit for bit, without VAE and text encoders.

    They round in another way alone than in a batch of several, so that the cache has as many at a
    time as the training: a pair, or the chosen side.
    """
    cache, small = str(tmp_path / "cache"), on_cpu(folder)
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    making += ["--data.group_size", "1", "--model.batch_size", str(sides)]
    main(["predict", "--config", "flux1-cache", *small, *making])
    images, cached = tmp_path / "images", tmp_path / "cached"
    main(
        [
            "fit",
            "--config",
            name,
            *small,
            *two_steps(images),
            *on_pairs(shards, batch_size=1),
            "--data.resolution",
            "32",
        ]
    )
    main(
        [
            "fit",
            "--config",
            name,
            *small,
            *two_steps(cached),
            *WITHOUT_ENCODERS,
            *on_pairs(cache, batch_size=1),
        ]
    )
    logged, again = scalars(images), scalars(cached)
    assert len(logged["train/loss"]) == 2
    for key in ("train/loss", "train/error"):
        assert logged[key] == again[key]
    if sides == 2:
        check_began_at_ln_2(logged)
    else:
        assert logged["train/loss"] == logged["train/error"]
    assert any(".lora_B." in key for key in load_file(images / LORA_WEIGHTS))


def test_a_training_from_cached_reference_errors(folder: str, shards: str, tmp_path: Path) -> None:
    """The guidance scale of the training is that of the table."""
    cache, table, small = str(tmp_path / "cache"), str(tmp_path / "errors"), on_cpu(folder)
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    main(["predict", "--config", "flux1-cache", *small, *making])
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "flux1-reference-cache", *small, *errors])
    arguments = [*two_steps(tmp_path / "run"), *WITHOUT_ENCODERS, *on_pairs(cache, batch_size=1)]
    arguments += ["--data.reference", table]
    main(["fit", "--config", DPO, *small, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0
    with pytest.raises(SystemExit, match="The reference's errors in .* differ .* in guidance"):
        main(["fit", "--config", DPO, *small, *arguments, "--backbone.guidance", "3.5"])

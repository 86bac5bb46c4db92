"""The recipes of FLUX.2 klein from pairs, caches and prompts to weights, very small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.recipes import LORA_WEIGHTS, check_began_at_ln_2, on_cpu, on_pairs, two_steps
from tests.helpers.runs import scalars
from tests.helpers.tiny_flux2 import tiny_flux2_pipeline


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    return on_cpu(tiny_flux2_pipeline(tmp_path_factory.mktemp("flux2")))


def of_a_run(folder: Path) -> list[str]:
    """Arguments of a run of two steps."""
    return [
        *two_steps(folder),
        *("--trainer.callbacks", "Checkpoints", "--trainer.callbacks+", "ExportWeights"),
    ]


def check_dpo(folder: Path) -> None:
    """Check that a run began at ln 2 with margin 0, moved, and wrote its LoRA."""
    logged = scalars(folder)
    check_began_at_ln_2(logged)
    layers = {name.split(".lora_")[0] for name in load_file(folder / LORA_WEIGHTS)}
    assert "transformer.single_transformer_blocks.1.attn.to_out" in layers


def test_a_cached_run_has_the_losses_of_a_run_on_images(
    common: list[str], shards: str, tmp_path: Path
) -> None:
    """Bit for bit, without encoders; and a table of the reference's errors serves as well."""
    cache = str(tmp_path / "cache")
    recipe = ["fit", "--config", "flux2-klein-diffusion-dpo", *common]
    recipe += ["--model.optimizer.lr", "1e-2"]  # so that one step of so small a model shows
    images = ["--data.resolution", "32", *of_a_run(tmp_path / "images"), *on_pairs(shards)]
    main([*recipe, *images])
    check_dpo(tmp_path / "images")
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    making += ["--model.batch_size", "4"]  # as many images and prompts at a time as in training
    main(["predict", "--config", "flux2-klein-cache", *common, *making])
    cached = ["--data", "CachedPairs", "--backbone.encoders", "false"]
    main([*recipe, *cached, *of_a_run(tmp_path / "cached"), *on_pairs(cache)])
    first, second = scalars(tmp_path / "images"), scalars(tmp_path / "cached")
    for name in ("train/loss", "train/error", "train/margin"):
        assert len(first[name]) == 2
        assert first[name] == second[name]

    table = str(tmp_path / "errors")
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "flux2-klein-reference-cache", *common, *errors])
    run = [*of_a_run(tmp_path / "table"), *on_pairs(cache)]
    main([*recipe, *cached, *run, "--data.reference", table])
    logged = scalars(tmp_path / "table")
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged["train/reference_error"][0] > 0


def test_sft_from_pairs_to_weights(common: list[str], shards: str, tmp_path: Path) -> None:
    arguments = ["--data.resolution", "32", *of_a_run(tmp_path / "run"), *on_pairs(shards)]
    main(["fit", "--config", "flux2-klein-sft", *common, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == logged["train/error"][0]
    assert (tmp_path / "run" / LORA_WEIGHTS).is_file()


def test_spo_from_prompts_to_weights(common: list[str], tmp_path: Path) -> None:
    records = [{"caption": f"picture {i}"} for i in range(6)]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    arguments = [
        *of_a_run(tmp_path / "run"),
        *("--data.prompts.path", str(tmp_path / "prompts.json")),
        *("--model.judge", "tests.helpers.judges.Brightness", "--model.threshold", "0"),
        *("--model.sampling.height", "32", "--model.sampling.width", "32"),
        *("--data.batches", "4", "--data.batch_size", "2", "--batch.pairs", "4"),
        *("--data.round_size", "1"),
    ]
    main(["fit", "--config", "flux2-klein-spo", *common, *arguments])
    logged = scalars(tmp_path / "run")
    check_began_at_ln_2(logged)
    assert (tmp_path / "run" / LORA_WEIGHTS).is_file()

"""The recipes of Stable Diffusion 3.5 from pairs, caches and prompts to weights, very small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.recipes import LORA_WEIGHTS, check_began_at_ln_2, on_cpu, two_steps
from tests.helpers.runs import scalars


@pytest.fixture
def common(tiny_sd35_folder: str) -> list[str]:
    """What makes a recipe small: the model, the precision, the device."""
    return on_cpu(tiny_sd35_folder)


def validated_pairs(folder: Path, shards: str) -> list[str]:
    """Arguments of a run of two steps on pairs of 32 pixels, four a step."""
    return [
        *two_steps(folder),
        *("--data.shards", shards, "--data.validation", shards, "--data.workers", "0"),
        *("--data.batch_size", "2", "--batch.pairs", "4", "--batch.validate_every", "2"),
    ]


def check_dpo(folder: Path) -> None:
    """Check that a run began at ln 2 with margin 0, moved, and wrote its LoRA."""
    logged = scalars(folder)
    check_began_at_ln_2(logged)
    assert 0 < logged["train/t"][0] <= 1
    assert math.isfinite(logged["val/loss"][-1])
    assert any(".lora_B." in name for name in load_file(folder / LORA_WEIGHTS))


SLOW = [pytest.param(of, marks=pytest.mark.slow) for of in ("noise", "image")]


@pytest.mark.parametrize("weighting", ["velocity", *SLOW])
def test_flow_dpo_from_pairs_to_weights(
    weighting: str, common: list[str], shards: str, tmp_path: Path
) -> None:
    arguments = ["--data.resolution", "32", "--model.weighting", weighting]
    arguments += validated_pairs(tmp_path / "run", shards)
    main(["fit", "--config", "sd35-diffusion-dpo", *common, *arguments])
    check_dpo(tmp_path / "run")
    backbone = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["backbone"]
    assert backbone["init_args"]["levels"]["draw"] == "logit-normal"
    assert backbone["init_args"]["lora"]["rank"] == 16


def test_sft_from_pairs_to_weights(common: list[str], shards: str, tmp_path: Path) -> None:
    arguments = ["--data.resolution", "32", *validated_pairs(tmp_path / "run", shards)]
    main(["fit", "--config", "sd35-sft", *common, *arguments])
    logged = scalars(tmp_path / "run")
    assert logged["train/loss"][0] == logged["train/error"][0]
    assert (tmp_path / "run" / LORA_WEIGHTS).is_file()


def test_a_training_from_both_caches(common: list[str], shards: str, tmp_path: Path) -> None:
    """One table of velocity errors serves two weightings, without encoders and reference."""
    cache, table = str(tmp_path / "cache"), str(tmp_path / "errors")
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    main(["predict", "--config", "sd35-cache", *common, *making])
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    main(["predict", "--config", "sd35-reference-cache", *common, *errors])
    for weighting in ("velocity", "noise"):
        run = tmp_path / weighting
        arguments = [
            "--data",
            "CachedPairs",
            *validated_pairs(run, cache),
            "--data.validation",
            "null",
        ]
        arguments += ["--data.reference", table, "--model.weighting", weighting]
        arguments += ["--backbone.encoders", "false", "--trainer.callbacks", "Checkpoints"]
        main(["fit", "--config", "sd35-diffusion-dpo", *common, *arguments])
        logged = scalars(run)
        assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
        assert logged["train/reference_error"][0] > 0
    first = [scalars(tmp_path / name)["train/error"][0] for name in ("velocity", "noise")]
    assert first[0] > first[1] > 0


def test_a_table_of_other_levels_is_refused(common: list[str], shards: str, tmp_path: Path) -> None:
    cache, table = str(tmp_path / "cache"), str(tmp_path / "errors")
    making = ["--model.resolution", "32", "--data.shards", shards, "--model.output", cache]
    main(["predict", "--config", "sd35-cache", *common, *making])
    errors = ["--data.shards", cache, "--model.output", table, "--model.batch_size", "2"]
    errors += ["--backbone.levels.draw", "uniform"]
    main(["predict", "--config", "sd35-reference-cache", *common, *errors])
    arguments = ["--data", "CachedPairs", *validated_pairs(tmp_path / "run", cache)]
    arguments += ["--data.validation", "null", "--data.reference", table]
    arguments += ["--backbone.encoders", "false", "--trainer.callbacks", "Checkpoints"]
    with pytest.raises(SystemExit, match="The reference's errors in .* differ .* in process"):
        main(["fit", "--config", "sd35-diffusion-dpo", *common, *arguments])


def test_spo_from_prompts_to_weights(common: list[str], tmp_path: Path) -> None:
    records = [{"caption": f"picture {i}"} for i in range(6)]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    arguments = [
        *two_steps(tmp_path / "run"),
        *("--data.prompts.path", str(tmp_path / "prompts.json")),
        *("--model.judge", "tests.helpers.judges.Brightness", "--model.threshold", "0"),
        *("--model.sampling.height", "32", "--model.sampling.width", "32"),
        *("--data.batches", "6", "--data.batch_size", "2", "--batch.pairs", "4"),
        *("--data.round_size", "1"),
    ]
    main(["fit", "--config", "sd35-spo", *common, *arguments])
    logged = scalars(tmp_path / "run")
    check_began_at_ln_2(logged)
    assert (tmp_path / "run" / LORA_WEIGHTS).is_file()

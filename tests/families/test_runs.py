"""Whole runs of every flow family: kills, two ranks, and from prompts to exported weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prefopt import load
from lit_prefopt.backbones import trained
from lit_prefopt.cli import main
from tests.families.all_cases import CASES, FIRST
from tests.families.cases import TEXTS, Models, sampled
from tests.families.conftest import CacheOf, FolderOf
from tests.families.test_training import from_cache, run_of
from tests.helpers.runs import assert_same_end, finished, kill, scalars, start, wait_for
from tests.helpers.strategy_runs import CPU, run_cases
from tests.helpers.strategy_runs import case as strategy_case

pytestmark = pytest.mark.slow
NAMES = [*FIRST.values()][::-1]
ON_CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
JUDGE = ["--model.judge", "tests.generate.test_ranked.Brightness"]


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_in_the_same_weights(
    name: str, folder_of: FolderOf, cache_of: CacheOf, tmp_path: Path
) -> None:
    whole, parts, beat = tmp_path / "whole", tmp_path / "parts", tmp_path / "beat"
    every = ["--trainer.callbacks.every_n_train_steps", "1"]

    def arguments(run: Path) -> list[str]:
        return [*from_cache(CASES[name], folder_of(name), cache_of(name), run), *every]

    main(["fit", *arguments(whole)])
    slow = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
    slow += ["--trainer.callbacks.path", str(beat), "--trainer.callbacks.pause", "0.3"]
    process = start([*arguments(parts), *slow])
    wait_for(beat, "batch 2", process)  # after the first checkpoint
    kill(process)
    finished(process)
    assert process.returncode == -9
    main(["fit", *arguments(parts), "--ckpt_path", "last"])
    assert_same_end(whole, parts)


@pytest.fixture(scope="module")
def ranks(shards: str, folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every family on two ranks, one after the other in two processes."""
    root = tmp_path_factory.mktemp("ranks")
    cases = []
    for name in NAMES:
        case = CASES[name]
        more = [*case.arguments_of(folder_of(name)), "--model.check_base", "false"]
        more += ["--data.resolution", str(case.sizes[0][0]), "--trainer.max_steps", "4"]
        # without the sample grid, whose images would be of the family's native size
        more += ["--trainer.callbacks", "Checkpoints", "--trainer.callbacks+", f"{CPU}.Seen"]
        more += ["--trainer.callbacks.folder", str(root / name)]
        cases.append(strategy_case("", shards, root / name, "ddp", "lora", *more))
    run_cases(cases, root / "cases.json")
    return root


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_the_same_weights_on_other_pairs(name: str, ranks: Path) -> None:
    a, b = (torch.load(ranks / name / f"seen-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a["losses"] == b["losses"]
    assert a["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(a["losses"][-1] - math.log(2)) > 1e-5
    for mine, others in zip(a["keys"], b["keys"], strict=True):
        assert not {*mine} & {*others}
    assert a["weights"].keys() == b["weights"].keys()
    assert a["weights"]
    assert all(torch.equal(b["weights"][key], weight) for key, weight in a["weights"].items())


@pytest.mark.parametrize("name", NAMES)
def test_from_prompts_to_exported_weights(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """Ranked samples, a training on them, a comparison with the base, and two exports."""
    case, folder, side = CASES[name], folder_of(name), str(CASES[name].sizes[0][0])
    (tmp_path / "prompts.txt").write_text("a cat\na red cube, left of a blue ball\n")
    of_prompts = ["--data.prompts.path", str(tmp_path / "prompts.txt"), "--data.group_size", "2"]
    how = ["--model.sampling.steps", "2", "--model.sampling.guidance", str(case.guided)]
    how += ["--model.sampling.height", side, "--model.sampling.width", side]
    pairs, run = tmp_path / "pairs", tmp_path / "run"
    main(
        [
            *("predict", "--config", "sd15-ranked", *case.arguments_of(folder)),
            *("--backbone.dtype", "float32", "--backbone.reference", "none"),
            *("--model.output", str(pairs), "--model.images", "3", *JUDGE, *how, *of_prompts),
            *ON_CPU,
        ]
    )
    data = ["--data", "PairShards", "--data.shards", str(pairs), "--data.resolution", side]
    fit = run_of(case, folder, run, *data)
    main(["fit", *fit, "--trainer.callbacks+", "ExportWeights"])
    assert scalars(run)["train/margin"][-1] != 0
    main(
        [
            *("evaluate", "--config", "sd35", "--model.policy", str(run)),
            *("--model.reference", str(folder), "--model.base", str(folder)),
            *("--model.output", str(tmp_path / "evaluation"), "--model.dtype", "float32"),
            *("--model.images", "1", "--model.pictures", "2", *JUDGE, *how, *of_prompts),
            *ON_CPU,
        ]
    )
    summary: dict[str, Any] = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert summary["prompts"] == 2
    backbone = load(run / "checkpoints" / "last.ckpt").backbone
    assert trained(backbone)
    for target in ("diffusers-lora", "pipeline"):
        output = tmp_path / target
        if target == "diffusers-lora":
            output = output / "pytorch_lora_weights.safetensors"
        main(["export", "--source", str(run), "--to", target, "--output", str(output)])
    lora = case.load(folder)
    lora.load_lora_weights(tmp_path / "diffusers-lora")
    for stock in (lora, case.load(tmp_path / "pipeline")):
        record = sampled(Models(case, backbone, stock), TEXTS[:1], case.unguided)
        torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)

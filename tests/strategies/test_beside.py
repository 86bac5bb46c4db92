"""What happens beside the steps where the weights lie in shards: validation, grids, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.strategy_runs import CPU, case, run_cases

pytestmark = pytest.mark.slow
KINDS = ("ddp", "zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def runs(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every strategy that validates, draws and evaluates."""
    root = tmp_path_factory.mktemp("beside")
    (root / "prompts.txt").write_text("open a red fox\nopen a blue vase")
    sampling = {"steps": 2}
    evaluation = {
        "judge": {
            "class_path": "tests.helpers.collecting.Picky",
            "init_args": {"folder": str(root)},
        },
        "prompts": {
            "class_path": "PromptFile",
            "init_args": {"path": str(root / "prompts.txt")},
        },
        "sampling": sampling,
        "pictures": 2,
    }
    callbacks = [
        {"class_path": "Checkpoints", "init_args": {"save_last": True}},
        {"class_path": "ExportWeights"},
        {"class_path": "SampleGrid", "init_args": {"count": 2, "sampling": sampling}},
        {"class_path": "Evaluation", "init_args": evaluation},
        {"class_path": f"{CPU}.Seen", "init_args": {"folder": str(root)}},
    ]
    validating = ["--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "2"]
    validating += ["--trainer.max_steps", "2", "--trainer.callbacks", json.dumps(callbacks)]
    cases = []
    for strategy in KINDS:
        arguments = case(tiny_folder, shards, root / strategy, strategy, "full", *validating)
        start = arguments.index("--trainer.callbacks+")  # of the callback that is there already
        cases.append(arguments[:start] + arguments[start + 4 :])
    guarded = ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"]
    guarded += ["--trainer.callbacks.every_n_train_steps", "1"]
    guarded += ["--trainer.callbacks+", "Guard", "--trainer.callbacks.on_spike", "rewind"]
    guarded += ["--trainer.callbacks.window", "3", "--trainer.callbacks.threshold", "0.05"]
    guarded += ["--trainer.callbacks.most", "100"]
    cases += [
        case(tiny_folder, shards, root / f"guarded-{name}", name, "full", *guarded)
        for name in ("ddp", "fsdp")
    ]
    (root / "output.txt").write_text(run_cases(cases, root / "cases.json"))
    return root


@pytest.mark.parametrize("strategy", KINDS[1:])
def test_grids_are_those_of_ddp(runs: Path, strategy: str) -> None:
    grids = [
        np.asarray(Image.open(runs / name / "samples" / "000002.png"), np.int16)
        for name in (strategy, "ddp")
    ]
    assert grids[0].shape == grids[1].shape
    assert abs(grids[0] - grids[1]).max() <= 3


@pytest.mark.parametrize("strategy", KINDS[1:])
def test_evaluations_are_those_of_ddp(runs: Path, strategy: str) -> None:
    ours, ddp = (
        json.loads((runs / name / "evaluation" / "evaluation.json").read_text())
        for name in (strategy, "ddp")
    )
    assert ours["reward_policy"] == pytest.approx(ddp["reward_policy"], abs=5e-3)
    assert ours["reward_reference"] == pytest.approx(ddp["reward_reference"], abs=5e-3)
    assert [step for step, _ in ours["held_out_accuracy"]] == [2]


@pytest.mark.parametrize("strategy", KINDS)
def test_the_end_is_written(runs: Path, strategy: str) -> None:
    weights = runs / strategy / "weights"
    assert (weights / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    config = json.loads((weights / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"


def test_the_guard_goes_back_in_shards_as_it_does_without(runs: Path) -> None:
    """The other runs have no guard."""
    ddp, ours = (
        torch.load(runs / f"guarded-{name}" / "seen-0.pt", weights_only=True)
        for name in ("ddp", "fsdp")
    )
    backs = (runs / "output.txt").read_text().count("the run is rewound to the weights of")
    assert backs >= 2
    assert backs % 2 == 0
    assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-4)

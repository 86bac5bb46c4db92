"""Recipes of methods with a reward from prompts to weights, at a very small size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.collecting import TWO, write_prompts
from tests.helpers.recipes import LORA_WEIGHTS, OWN_COUNTS, on_cpu, two_steps
from tests.helpers.runs import (
    TWO_RANKS,
    assert_same_end,
    finished,
    kill,
    lines,
    scalars,
    start,
    wait_until,
)
from tests.helpers.tiny_toy_flow import flow_twin

SMALL = [
    *("--model.judge", "tests.helpers.judges.Brightness", "--model.trajectories", "2"),
    *("--model.sampling.height", "32", "--model.sampling.width", "32"),
    *("--data.batches", "4", "--data.batch_size", "2", "--batch.pairs", "4"),
    *("--data.collection", "4", "--data.round_size", "1", "--trainer.log_every_n_steps", "1"),
]
FEW = [
    "--model.noisy_steps",
    "2",
    "--model.latest_start",
    "5",
    "--model.sampling.stochastic",
    "cps",
]
TRUST = ["--model.trust_region", "1e-5"]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sd35-flow-grpo", []),
        ("sd35-flow-grpo", [*FEW, *TRUST]),
        ("sd35-nft", []),
        ("sd15-ddpo", []),
    ],
    ids=["grpo", "few steps, trust region", "nft", "ddpo"],
)
def test_from_prompts_to_weights(
    name: str, more: list[str], tiny_sd35_folder: str, tiny_folder: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", opens=5, shut=0)
    small = [*SMALL, "--data.prompts.path", str(prompts), *more]
    if name == "sd15-ddpo":
        small += ["--model.sampling.steps", "4", "--model.drawn_steps", "2"]
    folder = tiny_folder if name == "sd15-ddpo" else tiny_sd35_folder
    main(["fit", "--config", name, *on_cpu(folder), *two_steps(tmp_path / "run"), *small])
    logged = scalars(tmp_path / "run")
    assert all(map(math.isfinite, logged["train/loss"]))
    assert logged["train/spread"][0] > 0
    if name == "sd35-nft":
        assert logged["train/positive"][0] == pytest.approx(logged["train/negative"][0])
        assert logged["train/drift"][0] == 0
    elif name == "sd35-flow-grpo":
        assert logged["train/reference_kl"][0] == 0
        assert logged["train/reference_kl"][1] > 0
    weights = load_file(tmp_path / "run" / LORA_WEIGHTS)
    assert any(value.abs().max() > 0 for key, value in weights.items() if ".lora_B." in key)


def arguments(name: str, pipeline: str, root: Path, judged: Path) -> list[str]:
    """Return the arguments of a run of three collections of four batches, with an average."""
    root.parent.mkdir(exist_ok=True)
    prompts = write_prompts(root.parent / "prompts.txt", opens=9, shut=4)
    method = ["--model.deviation", "global", "--model.trajectories", "3"]
    method += ["--model.sampling.steps", "3"]
    if name == "toy-flow-grpo":
        method += ["--model.noisy_steps", "2", "--model.latest_start", "1"]
    else:
        method += ["--model.average.rate", "0.1"]
    return [
        *("--config", name, *flow_twin(pipeline), "--backbone.lora.rank", "4", *method),
        *("--model.optimizer.lr", "1e-3", "--model.judge", "tests.helpers.collecting.Picky"),
        *("--model.judge.folder", str(judged)),
        *("--data", "PromptCollections", "--data.prompts", "PromptFile"),
        *("--data.prompts.path", str(prompts), "--data.resolution", "32"),
        *("--data.batch_size", "3", "--data.batches", "4", "--data.collection", "12"),
        *("--data.round_size", "2", "--trainer.max_steps", "12", *OWN_COUNTS),
        *("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(root)),
        *("--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "1"),
        *("--trainer.callbacks.save_last", "true", "--trainer.callbacks.filename", "{step}"),
    ]


def end(root: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-flow-grpo", "toy-flow-nft"])
def test_killed_in_a_collection_and_in_the_training(
    name: str, toy_flow_folder: str, tmp_path: Path
) -> None:
    """SIGKILL in the first batch of the second collection and in the roll-outs of the third."""
    whole = arguments(name, toy_flow_folder, tmp_path / "whole" / "run", tmp_path)
    main(["fit", *whole])
    root, seen = tmp_path / "parts" / "run", tmp_path / "parts" / "judged-0.jsonl"
    parts = arguments(name, toy_flow_folder, root, seen.parent)
    slowly = ["--trainer.callbacks+", "tests.helpers.runs.Beat", "--model.judge.pause", "0.3"]
    slowly += ["--trainer.callbacks.path", str(seen), "--trainer.callbacks.pause", "0.3"]
    for batch, judged in ((5, 0), (7, 1)):
        seen.unlink(missing_ok=True)
        begun = ["--ckpt_path", "last"] if (root / "checkpoints" / "last.ckpt").exists() else []
        process = start([*parts, *slowly, *begun])

        def reached(batch: int = batch, judged: int = judged) -> bool:
            so_far = lines(seen)
            if f"batch {batch}" not in so_far:
                return False
            after = so_far[so_far.index(f"batch {batch}") + 1 :]
            return sum(line.startswith("[") for line in after) >= judged

        wait_until(reached, process)
        kill(process)
        said = process.communicate()[0]
        assert process.returncode == -9, said
    main(["fit", *parts, "--ckpt_path", "last"])
    assert_same_end(tmp_path / "whole" / "run", root)
    a, b = end(tmp_path / "whole" / "run"), end(root)
    if name == "toy-flow-nft":
        assert a["sampling_average"].keys() == a["state_dict"].keys()
        for key, value in a["sampling_average"].items():
            assert torch.equal(value, b["sampling_average"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-flow-grpo", "toy-flow-nft"])
def test_two_ranks_share_the_deviation(name: str, toy_flow_folder: str, tmp_path: Path) -> None:
    """Both ranks end in the same weights, although their scores differ."""
    root = tmp_path / "both" / "run"
    both = arguments(name, toy_flow_folder, root, tmp_path)
    witness = ["--trainer.callbacks+", "tests.helpers.two_ranks_reward.Shared"]
    witness += ["--trainer.callbacks.folder", str(tmp_path)]
    process = start([*both, *TWO, *witness], command=TWO_RANKS)
    said = finished(process)
    assert process.returncode == 0, said
    a, b = (torch.load(tmp_path / f"shared-{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    scores = torch.cat([a["scores"], b["scores"]]).double()
    assert not torch.equal(a["scores"], b["scores"])
    deviation = (scores - scores.mean()).square().mean().sqrt() + 1e-4
    for one in (a, b):
        grouped = one["scores"].double().view(-1, 3)
        expected = (grouped - grouped.mean(1, keepdim=True)) / deviation
        torch.testing.assert_close(
            one["advantages"].double().view(-1, 3), expected, atol=1e-4, rtol=1e-3
        )

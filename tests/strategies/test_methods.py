"""Two real processes: every method's gradients are the same on both, and collections too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_prefopt import methods
from tests.helpers.collecting import pairs_of_rounds, spo, write_prompts
from tests.helpers.recipes import OWN_COUNTS, small_recipe
from tests.helpers.runs import same
from tests.helpers.strategy_runs import CPU, STRATEGIES, run_cases

pytestmark = pytest.mark.slow
STEPS = 3
ON_PAIRS = {
    "DiffusionDPO": "toy-diffusion-dpo",
    "SupervisedFineTuning": "toy-sft",
    "SPINDiffusion": "toy-spin",
    "Di3PO": "toy-di3po",
    "MaPO": "toy-mapo",
    "DSPO": "toy-dspo",
    "CaPO": "toy-capo",
    "InPO": "toy-inpo",
    "SmPO": "toy-smpo",
    "CurriculumDPO": "toy-curriculum-dpo",
    "DiffusionKTO": "toy-kto",
    "RankDPO": "toy-rank-dpo",
    "ConsistencyDPO": "toy-lcm-curriculum-dpo",
}
ON_POLICY = {
    "D3PO": "toy-d3po",
    "DenseRewardDPO": "toy-dense-reward",
    "PolicyGradient": "toy-ddpo",
    "DiffusionNFT": "toy-flow-nft",
}
OF_GROUPS = ("PolicyGradient", "DiffusionNFT")
# PNAPO needs a flow's own samples; a step of OfflineNFT is DiffusionNFT's
TESTED = [name for name in methods.__all__ if name not in ("PNAPO", "OfflineNFT")]
TWO = ["--trainer", "hardware/ddp.yaml", "--trainer.devices", "2"]


@pytest.fixture(scope="module")
def runs(
    tiny_folder: str, tiny_lcm_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the gradients that every method had on both ranks, and SPO under ZeRO-2."""
    root = tmp_path_factory.mktemp("methods")
    prompts = write_prompts(root / "prompts.txt", opens=9, shut=6)
    cases = {
        name: [
            *small_recipe(tiny_folder, shards, root / name, recipe),
            *("--trainer.limit_val_batches", "0"),
        ]
        for name, recipe in ON_PAIRS.items()
    }
    cases["CurriculumDPO"] += [
        *("--data", "CurriculumPairs", "--data.stages", json.dumps([shards])),
        *("--data.stage_steps", "2", "--data.batch_size", "4", "--data.resolution", "32"),
        *("--data.workers", "0"),
    ]
    student = ["--backbone", "LatentConsistency", "--backbone.pretrained", tiny_lcm_folder]
    student += ["--backbone.teacher", tiny_folder]
    cases["ConsistencyDPO"] += student
    cases["ConsistencyDistillation"] = [
        *small_recipe(tiny_folder, shards, root / "ConsistencyDistillation"),
        *(*student, "--backbone.reference", "none", "--trainer.limit_val_batches", "0"),
        *("--model", "ConsistencyDistillation", "--model.optimizer.lr", "1e-3"),
    ]
    for name in ("SPO", "SPO-zero2", "SPO-zero3"):
        (root / name).mkdir()
        cases[name] = spo(tiny_folder, prompts, root / name / "run")
    for name, method in ON_POLICY.items():
        cases[name] = [
            *("--config", method, "--backbone", "StableDiffusion"),
            *("--backbone.pretrained", tiny_folder, "--model.sampling.steps", "3"),
            *("--model.judge", "tests.helpers.judges.Brightness"),
            *("--data", "PromptCollections", "--data.prompts", "PromptFile"),
            *("--data.prompts.path", str(prompts), "--data.resolution", "32"),
            *("--data.batch_size", "2", "--data.batches", "2", "--data.collection", "2"),
            *OWN_COUNTS,
            *("--data.round_size", "2", "--trainer.enable_progress_bar", "false"),
            *("--trainer.default_root_dir", str(root / name / "run")),
        ]
        if name in OF_GROUPS:  # the standard deviation of all scores on both ranks
            cases[name] += ["--model.trajectories", "2", "--model.deviation", "global"]
            cases[name] += ["--data.collection", "4"]
    whole = []
    for name, arguments in cases.items():
        strategy = STRATEGIES["zero2"] if name == "SPO-zero2" else TWO
        strategy = STRATEGIES["zero3"] if name == "SPO-zero3" else strategy
        watch = "Seen" if "zero" in name else "WholeGradients"
        callback = ["--trainer.callbacks+", f"{CPU}.{watch}"]
        callback += ["--trainer.callbacks.folder", str(root / name)]
        steps = ["--trainer.max_steps", "6" if name.startswith("SPO") else str(STEPS)]
        whole.append(["fit", *arguments, *strategy, "--trainer.devices", "2", *steps, *callback])
    run_cases(whole, root / "cases.json")
    return root


@pytest.mark.parametrize("name", TESTED)
def test_gradients_are_the_same_on_both_ranks(runs: Path, name: str) -> None:
    a, b = (torch.load(runs / name / f"gradients-{r}.pt", weights_only=True) for r in (0, 1))
    assert len(a) == len(b) == (6 if name == "SPO" else STEPS)
    for mine, others in zip(a, b, strict=True):
        assert mine.abs().max() > 0
        assert torch.equal(mine, others)


@pytest.mark.parametrize("name", ["SPO-zero2", "SPO-zero3"])
def test_collections_under_zero_are_those_of_ddp(runs: Path, name: str) -> None:
    """Ranks accept different numbers of pairs, and still ask the denoiser equally often."""
    counts = [pairs_of_rounds(runs / name / f"judged-{r}.jsonl") for r in (0, 1)]
    assert len(counts[0]) == len(counts[1])
    assert counts[0] != counts[1]
    ddp = [pairs_of_rounds(runs / "SPO" / f"judged-{r}.jsonl") for r in (0, 1)]
    assert counts == ddp
    losses = torch.load(runs / name / "seen-0.pt", weights_only=True)["losses"]
    assert len(losses) == 6
    ours, ddp_end = (
        torch.load(runs / n / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for n in (name, "SPO")
    )
    assert not same(ours, {key: torch.zeros_like(value) for key, value in ours.items()})
    for key, value in ddp_end.items():
        torch.testing.assert_close(ours[key], value, atol=5e-3, rtol=0)

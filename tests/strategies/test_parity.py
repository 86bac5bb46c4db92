"""Two real processes: whatever shards, the losses are DDP's, and so is what is taken home."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lit_prefopt.cli import main
from tests.helpers.strategy_runs import FORMS, STRATEGIES, case, run_cases

pytestmark = pytest.mark.slow
SHARDED = [name for name in STRATEGIES if name != "ddp"]


@pytest.fixture(scope="module")
def runs(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every strategy and form, `STRATEGY-FORM`."""
    root = tmp_path_factory.mktemp("parity")
    cases = [
        case(tiny_folder, shards, root / f"{strategy}-{form}", strategy, form)
        for form in FORMS
        for strategy in STRATEGIES
    ]
    run_cases(cases, root / "cases.json")
    return root


def seen(run: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(run / f"seen-{rank}.pt", weights_only=True)


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("form", FORMS)
def test_losses_leave_ln_2(runs: Path, form: str) -> None:
    losses = seen(runs / f"ddp-{form}")["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in losses) > 0.05


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_losses_are_those_of_ddp(runs: Path, strategy: str, form: str) -> None:
    ours, ddp = (seen(runs / f"{name}-{form}") for name in (strategy, "ddp"))
    assert len(ours["losses"]) == 10
    assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-4)
    other = seen(runs / f"{strategy}-{form}", rank=1)
    assert ours["losses"] == other["losses"]
    assert ours["keys"] == ddp["keys"]
    for mine, others in zip(ours["keys"], other["keys"], strict=True):
        assert not set(mine) & set(others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_checkpoints_are_those_of_ddp(runs: Path, strategy: str, form: str) -> None:
    """Trained weights alone, and AdamW's moments of each."""
    ours, ddp = (last(runs / f"{name}-{form}") for name in (strategy, "ddp"))
    assert ours["state_dict"].keys() == ddp["state_dict"].keys()
    [a], [b] = ours["optimizer_states"], ddp["optimizer_states"]
    assert a["state"].keys() == b["state"].keys()
    assert a["param_groups"] == b["param_groups"]
    for name, weight in ddp["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=2e-3, rtol=0)
    for number, state in b["state"].items():
        assert a["state"][number]["step"] == state["step"] == 10
        for moment in ("exp_avg", "exp_avg_sq"):
            largest = state[moment].abs().max().item()
            close = {"atol": 0.02 * largest, "rtol": 0}
            torch.testing.assert_close(a["state"][number][moment], state[moment], **close)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_moments_are_divided_and_those_of_trained_weights(
    runs: Path, strategy: str, form: str
) -> None:
    a, b = (seen(runs / f"{strategy}-{form}", rank) for rank in (0, 1))
    trained = sum(weight.numel() for weight in a["weights"].values())
    assert trained <= a["moments"] + b["moments"] < 1.05 * trained  # filled up with zeros
    assert max(a["moments"], b["moments"]) < 0.6 * trained


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_frozen_copy_is_divided_where_weights_are(runs: Path, strategy: str) -> None:
    """A LoRA has none: its reference is the network without it."""
    whole = seen(runs / "ddp-full")["frozen"]
    share = seen(runs / f"{strategy}-full")["frozen"] / whole
    assert share < 0.6 if strategy in ("zero3", "zero3-offload", "fsdp") else share == 1
    assert seen(runs / f"{strategy}-lora")["frozen"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exports_load_in_the_stock_pipeline(
    runs: Path, strategy: str, form: str, tmp_path: Path
) -> None:
    """From the checkpoint, and what the run itself wrote at its end."""
    run = runs / f"{strategy}-{form}"
    source = str(run / "checkpoints" / "last.ckpt")
    main(["export", "--source", source, "--to", "pipeline", "--output", str(tmp_path / "whole")])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a", num_inference_steps=2, output_type="pt", height=32, width=32).images
    assert images.isfinite().all()
    exported = pipeline.unet.state_dict()
    main(["export", "--source", str(run), "--to", "unet", "--output", str(tmp_path / "unet")])
    own = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    own.unet = type(own.unet).from_pretrained(tmp_path / "unet")
    for name, weight in own.unet.state_dict().items():
        torch.testing.assert_close(weight, exported[name], atol=1e-6, rtol=0)

"""Flow-DPO on two real processes: sharded by the transformer's own blocks, its losses are DDP's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from lit_prefopt.cli import main
from tests.helpers.strategy_runs import FORMS, case, run_cases
from tests.helpers.tiny_toy_flow import flow_twin
from tests.strategies.test_parity import last, seen

pytestmark = pytest.mark.slow
SHARDED = ("fsdp", "zero3")


def flow_case(pipeline: str, shards: str, folder: Path, strategy: str, form: str) -> list[str]:
    """Return the command of six steps of the toy world's Flow-DPO."""
    more = [*flow_twin(pipeline), "--trainer.max_steps", "6", "--model.optimizer.warmup_steps", "0"]
    name = "toy-flow-diffusion-dpo"
    return case(pipeline, shards, folder, strategy, form, *more, name=name)


@pytest.fixture(scope="module")
def runs(toy_flow_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every strategy and form, `STRATEGY-FORM`."""
    root = tmp_path_factory.mktemp("flow")
    cases = [
        flow_case(toy_flow_folder, shards, root / f"{strategy}-{form}", strategy, form)
        for form in FORMS
        for strategy in ("ddp", *SHARDED)
    ]
    run_cases(cases, root / "cases.json")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_take_the_steps_of_one(
    runs: Path, toy_flow_folder: str, shards: str, tmp_path: Path, form: str
) -> None:
    """One rank with batches of eight and two ranks with four each see the same pairs."""
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "8"]
    main([*flow_case(toy_flow_folder, shards, tmp_path, "ddp", form), *alone])
    one, a, b = seen(tmp_path), *(seen(runs / f"ddp-{form}", rank) for rank in (0, 1))
    assert len(one["losses"]) == 6
    for together, first, second in zip(one["keys"], a["keys"], b["keys"], strict=True):
        assert len(first) == len(second) == 4
        assert sorted(together) == sorted(first + second)
    assert a["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert a["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.equal(a["weights"][name], b["weights"][name]), name
        torch.testing.assert_close(a["weights"][name], weight, atol=2e-3, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_losses_and_checkpoints_are_those_of_ddp(runs: Path, strategy: str, form: str) -> None:
    ours, ddp = (seen(runs / f"{name}-{form}") for name in (strategy, "ddp"))
    assert ddp["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in ddp["losses"]) > 0.01
    assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-4)
    assert ours["keys"] == ddp["keys"]
    mine, whole = (last(runs / f"{name}-{form}") for name in (strategy, "ddp"))
    assert mine["state_dict"].keys() == whole["state_dict"].keys()
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], weight, atol=2e-3, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_moments_and_the_frozen_copy_are_divided(runs: Path, strategy: str, form: str) -> None:
    a, b = (seen(runs / f"{strategy}-{form}", rank) for rank in (0, 1))
    trained = sum(weight.numel() for weight in a["weights"].values())
    assert trained <= a["moments"] + b["moments"] < 1.05 * trained
    whole = seen(runs / f"ddp-{form}")["frozen"]
    assert a["frozen"] <= 0.6 * whole
    assert (whole == 0) == (form == "lora")


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_full_fine_tune_is_exported(runs: Path, strategy: str, tmp_path: Path) -> None:
    source = str(runs / f"{strategy}-full")
    main(["export", "--source", source, "--to", "transformer", "--output", str(tmp_path / "net")])
    exported = SD3Transformer2DModel.from_pretrained(tmp_path / "net").state_dict()
    saved = last(runs / f"{strategy}-full")["state_dict"]
    for name, weight in saved.items():
        short = name.removeprefix("backbone.policy.denoiser.")
        torch.testing.assert_close(exported[short], weight, atol=1e-6, rtol=0)

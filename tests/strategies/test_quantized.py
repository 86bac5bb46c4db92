"""A LoRA over quantized weights on two real processes: its losses are DDP's, or it is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_prefopt.backbones import LoRA
from lit_prefopt.backbones.quantization import quantize
from lit_prefopt.errors import InputError
from lit_prefopt.strategies import FullySharded
from tests.helpers.strategy_runs import case, run_cases
from tests.helpers.tiny_sd3 import tiny_sd3_transformer
from tests.strategies.test_parity import last, seen

SHARDED = [("zero2", "int8"), ("zero3", "int8"), ("fsdp", "int8"), ("zero3", "nf4")]


@pytest.fixture(scope="module")
def runs(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every strategy and quantization, `STRATEGY-KIND`."""
    root = tmp_path_factory.mktemp("quantized")
    cases = [
        case(
            *(tiny_folder, shards, root / f"{strategy}-{kind}", strategy, "lora"),
            *("--backbone.quantization", kind, "--trainer.max_steps", "5"),
        )
        for strategy, kind in [("ddp", "int8"), ("ddp", "nf4"), *SHARDED]
    ]
    run_cases(cases, root / "cases.json")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kind"), SHARDED)
def test_losses_and_checkpoints_are_those_of_ddp(runs: Path, strategy: str, kind: str) -> None:
    ours, ddp = (seen(runs / f"{name}-{kind}") for name in (strategy, "ddp"))
    assert ddp["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in ddp["losses"]) > 0.005
    assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-4)
    mine, whole = (last(runs / f"{name}-{kind}")["state_dict"] for name in (strategy, "ddp"))
    assert mine.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(mine[name], weight, atol=2e-3, rtol=0)


def test_four_bits_are_not_sharded_by_fsdp() -> None:
    owner = nn.Module()
    owner.net = tiny_sd3_transformer().requires_grad_(False)
    quantize(owner.net, "nf4", torch.float32, LoRA(4))
    with pytest.raises(InputError, match="--backbone.quantization int8"):
        FullySharded().shard(owner, "net")

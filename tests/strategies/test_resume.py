"""Runs whose weights lie in shards go on to the last bit, and on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lit_prefopt.cli import main
from tests.helpers.runs import WEIGHTS, same
from tests.helpers.strategy_runs import case, run_cases

pytestmark = pytest.mark.slow
AVERAGING = ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
KINDS = {"zero2": AVERAGING, "zero3": [], "zero2-offload": [], "fsdp": AVERAGING}


@pytest.fixture(scope="module")
def runs(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs in one piece, `whole-STRATEGY`, and in two, `parts-STRATEGY`."""
    root = tmp_path_factory.mktemp("resume")
    cases = []
    for strategy, more in KINDS.items():
        whole, parts = (
            case(tiny_folder, shards, root / f"{how}-{strategy}", strategy, "full", *more)
            for how in ("whole", "parts")
        )
        accumulate = ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "1"]
        cases += [[*whole, *accumulate], [*parts, *accumulate, "--trainer.max_steps", "5"]]
        cases += [[*parts, *accumulate, "--ckpt_path", "last"]]
    cases.append(case(tiny_folder, shards, root / "ddp", "ddp", "full"))
    begun = case(tiny_folder, shards, root / "zero3", "zero3", "full")
    cases.append([*begun, "--trainer.max_steps", "4"])
    run_cases(cases, root / "cases.json")
    return root


@pytest.mark.parametrize("strategy", KINDS)
def test_a_run_in_two_parts_ends_in_the_same_bits(runs: Path, strategy: str) -> None:
    whole, parts = (
        torch.load(runs / f"{how}-{strategy}" / "checkpoints" / "last.ckpt", weights_only=True)
        for how in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] == 10
    assert ("running_state" in whole) == bool(KINDS[strategy])
    for key in WEIGHTS:
        assert same(whole.get(key), parts.get(key)), key


def test_one_device_goes_on_from_shards_of_two(
    runs: Path, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    """Four steps under ZeRO-3 on two ranks, then six on one without it: losses are DDP's."""
    whole = case(tiny_folder, shards, tmp_path / "whole", "ddp", "full")
    back = case(tiny_folder, shards, tmp_path / "back", "fsdp", "full", "--trainer.max_steps", "7")
    shutil.copytree(runs / "zero3" / "checkpoints", tmp_path / "back" / "checkpoints")
    run_cases([[*back, "--ckpt_path", "last"]], tmp_path / "second.json")
    alone = ["--data.batch_size", "8", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    alone += ["--trainer.default_root_dir", str(tmp_path / "back"), "--ckpt_path", "last"]
    alone += ["--trainer.callbacks.folder", str(tmp_path / "alone")]
    main([*whole, *alone])
    parts = [_losses(f) for f in (runs / "zero3", tmp_path / "back", tmp_path / "alone")]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert sum(parts, []) == pytest.approx(_losses(runs / "ddp"), abs=1e-4)


def _losses(folder: Path) -> list[float]:
    return torch.load(folder / "seen-0.pt", weights_only=True)["losses"]

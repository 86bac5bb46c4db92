"""Two real processes: disjoint pairs, equal gradients, equal weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_two_ranks_agree(rank: int, tmp_path: Path, tiny_folder: str, shards: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = [str(tmp_path), tiny_folder, shards, str(rank)]
    subprocess.run(
        [*launch, "--standalone", "-m", "tests.helpers.two_ranks_module", *arguments],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    a, b = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    assert len(a["keys"]) == len(b["keys"]) == 12
    assert not set(a["keys"]) & set(b["keys"])
    assert len(set(a["keys"]) | set(b["keys"])) == 24
    assert len(a["gradients"]) == 4
    for mine, others in zip(a["gradients"], b["gradients"], strict=True):
        assert mine.abs().max() > 0
        assert torch.equal(mine, others)
    assert torch.equal(a["weights"], b["weights"])
    assert a["accuracy"] == b["accuracy"]
    assert a["chance_95"].item() == pytest.approx(0.5 + 0.98 / 24**0.5)  # the pairs of both ranks

"""The figures of the guide on flow models, computed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import LevelDraw

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "flow-models.md"
ROW = re.compile(r"^\| `([a-z-]+)` \|[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
COUNT = 1_000_000


def means(draw: str) -> list[float]:
    """Return the median of sigma, and the means of (1 - sigma)^2 and of sigma^2."""
    u = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    config = {"num_train_timesteps": 1000, "shift": 3.0}
    t = RectifiedFlow(config, LevelDraw(draw)).draw_levels(u, (16, 64, 64))
    return [float(t.median()), float((1 - t).square().mean()), float(t.square().mean())]


def test_means_of_the_draws() -> None:
    stated = {
        row[0]: [float(number) for number in row[1:]] for row in ROW.findall(GUIDE.read_text())
    }
    assert len(stated) == 5
    for draw, numbers in stated.items():
        assert numbers == pytest.approx(means(draw), abs=6e-4), draw


def test_the_converted_betas() -> None:
    """5000 on noise errors, in the mean over the draw."""
    [(shifted, plain)] = re.findall(r"are about ([\d,]+) on\s+velocity.*?, ([\d,]+) with",
                                    GUIDE.read_text(), re.DOTALL)  # fmt: skip
    for number, draw in ((shifted, "logit-normal-shifted"), (plain, "logit-normal")):
        assert float(number.replace(",", "")) == pytest.approx(5000 * means(draw)[1], rel=0.02)

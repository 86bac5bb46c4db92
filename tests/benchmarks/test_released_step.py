"""The benchmark of a fit against the published procedure, on very small networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.released_step import main

FORMS = ("fit from images", "fit from a cache", "fit from a cache with the reference's errors")


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the first table below a heading, by their first cells."""
    lines = text[text.index(f"## {heading}") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows: dict[str, list[str]] = {}
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def numbers(cell: str) -> list[float]:
    """Return median, lowest and highest of a cell."""
    return [float(number) for number in re.findall(r"\d[\d.e+-]*", cell)]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_all_tables(train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        family="tiny",
        train=train,  # type: ignore[arg-type]
        pairs=8,
        rounds=3,
        steps=1,
        equal_steps=3,
        visits=1,
        folder=str(tmp_path),
        measures=None if train == "lora" else ["equal"],
    )
    text = capsys.readouterr().out
    equal = table(text, "Equal maths")
    assert tuple(equal) == FORMS
    for apart, far, weights, moved in (map(float, cells) for cells in equal.values()):
        assert apart < 5e-4, "rounding of float32 errors, times beta"
        assert far > 5 * apart, "losses that leave ln 2 show that the same steps were taken"
        assert moved > 0
        assert weights < moved
    if train == "full":
        return
    steps, whole = table(text, "A step"), table(text, "Whole runs")
    assert tuple(steps) == FORMS
    assert tuple(whole) == ("plain script", *FORMS)
    for cells in steps.values():
        plain, fit, ratio = (numbers(cell) for cell in cells[:3])
        assert all(low <= middle <= high for middle, low, high in (plain, fit, ratio))
        assert plain[1] / fit[2] <= ratio[0] * 1.001
        assert ratio[0] <= plain[2] / fit[1] * 1.001
    memory = table(text, "Peak memory")
    assert tuple(memory) == ("plain script", *FORMS)
    assert all(float(peak) > float(before) > 0 for peak, before, _ in memory.values())

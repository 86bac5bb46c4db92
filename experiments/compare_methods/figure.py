"""True reward against denoiser evaluations, with 95 % intervals over seeds and prompts."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from experiments.compare_methods.plan import REPORTS, Comparison, Row
from experiments.compare_methods.table import own_and_starts
from lit_prefopt.evaluate.statistics import two_way_interval

COLOURS = plt.colormaps["tab10"].colors  # type: ignore[attr-defined]
STROKES = ("-", "--", ":")


def curve(
    what: Comparison, rows: list[Row], method: str
) -> tuple[list[float], list[NDArray[np.float64]]] | None:
    """Return a method's evaluations and what it had gained by then, each (runs, prompts).

    Only runs that were judged in mid-run count; a round goes on where the round before has ended.
    """
    own, starts = own_and_starts(what, rows, method)
    both = [pair for pair in zip(own, starts, strict=True) if pair[0].get("curve")]
    if not both:
        return None
    offset, before = 0.0, what.method(method).after
    while before is not None:
        offset += what.limits(before)["evaluations"]
        before = what.method(before).after
    points = [_points(row) for row, _ in both]
    count = min(len(some) for some in points)
    spent, gained = [], []
    for i in range(count):
        spent.append(offset + float(np.mean([some[i][0] for some in points])))
        now = np.array([some[i][1] for some in points])
        then = np.array([start["before"][: now.shape[1]] for _, start in both])
        gained.append(now - then)
    return spent, gained


def _points(row: Row) -> list[tuple[float, list[float]]]:
    judged = len(row["curve"][0]["rewards"])
    return [
        (0.0, row["before"][:judged]),
        *((point["evaluations"], point["rewards"]) for point in row["curve"]),
        (row["evaluations"], row["after"][:judged]),
    ]


def draw(what: Comparison, rows: list[Row]) -> Path | None:
    """Draw all methods that have a curve, and return the picture's path; None without any."""
    curves = {name: found for name in what.methods if (found := curve(what, rows, name))}
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    new = cycle(product(STROKES, COLOURS))
    looks: dict[str | None, tuple[str, Any]] = {}
    for name, (spent, gained) in curves.items():
        # a round goes on with the line of the round before
        stroke, colour = looks[name] = looks.get(what.method(name).after) or next(new)
        axes.plot(
            spent,
            [now.mean() for now in gained],
            color=colour,
            linestyle=stroke,
            label=f"{name} ({len(gained[0])})",
            marker="o",
            markersize=3,
        )
        low, high = zip(*(two_way_interval(now) for now in gained), strict=True)
        axes.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("denoiser evaluations of the run")
    axes.set_ylabel("true reward, gained")
    figure.legend(loc="outside right upper", fontsize=8, title="method (seeds)", title_fontsize=8)
    path = REPORTS / f"{what.name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

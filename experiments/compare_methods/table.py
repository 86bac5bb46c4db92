"""Finished runs in numbers, with 95 % intervals over seeds and prompts."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.compare_methods.plan import Comparison, Row
from lit_prefopt.evaluate.statistics import two_way_interval

HEAD = (
    "method",
    "seeds",
    "start",
    "mean true reward",
    "difference",
    "win rate",
    "worse by > 0.01",
    "steps",
    "pairs seen",
    "judge calls, data + run",
    "evaluations, data + run",
    "seconds",
)
UNKNOWN = "—"  # rows from before it was recorded


def table(what: Comparison, rows: list[Row]) -> str:
    """Return the finished runs as a table, a method a line."""
    names = list(rows[0]["attributes"]) if rows else []
    lines = [f"| {' | '.join([*HEAD, *names])} |", "|---" * (len(HEAD) + len(names)) + "|"]
    for method in what.methods:
        own, starts = own_and_starts(what, rows, method)
        if own:
            cells = _cells(what, method, own, starts)
            cells += [f"{_risen(own, starts, name):+.3f}" for name in names]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def own_and_starts(what: Comparison, rows: list[Row], method: str) -> tuple[list[Row], list[Row]]:
    """Return a method's rows by seed, and for each the row whose start it is compared with."""
    start = {(row["method"], row["seed"]): row for row in rows}
    against = what.method(method).against or method
    own = [r for r in rows if r["method"] == method and (against, r["seed"]) in start]
    own.sort(key=lambda row: row["seed"])
    return own, [start[against, row["seed"]] for row in own]


def gains(own: list[Row], starts: list[Row]) -> NDArray[np.float64]:
    """Return what each run has gained on each prompt, (runs, prompts)."""
    return np.array([row["after"] for row in own]) - np.array([row["before"] for row in starts])


def _cells(what: Comparison, method: str, own: list[Row], starts: list[Row]) -> list[str]:
    gained = gains(own, starts)
    after = np.array([row["after"] for row in own])
    wins = (np.sign(gained) + 1) / 2
    low, high = two_way_interval(gained)
    least, most = two_way_interval(wins)
    data = what.method(method).data
    return [
        method,
        str(len(own)),
        f"{(after - gained).mean():.3f}",
        f"{after.mean():.3f} ({', '.join(f'{x:.3f}' for x in after.mean(1))})",
        f"{gained.mean():+.4f} ({low:+.4f} to {high:+.4f})",
        f"{wins.mean():.3f} ({least:.3f} to {most:.3f})",
        f"{(gained < -0.01).mean():.0%}",
        _mean(own, "steps"),
        _mean(own, "pairs"),
        f"{data.judge_calls:,} + {_mean(own, 'judge_calls')}",
        f"{data.evaluations:,} + {_mean(own, 'evaluations')}",
        _mean(own, "seconds_training"),
    ]


def _mean(rows: list[Row], name: str) -> str:
    """Return the mean of what rows know; those that do not know it are left out."""
    known = [row[name] for row in rows if name in row]
    return f"{np.mean(known):,.0f}" if known else UNKNOWN


def _risen(own: list[Row], starts: list[Row], name: str) -> float:
    """Return how far an attribute has risen since the start."""
    pairs = zip(own, starts, strict=True)
    return float(np.mean([_attribute(row, start, name) for row, start in pairs]))


def _attribute(row: Row, start: Row, name: str) -> float:
    risen: float = row["attributes"].get(name, np.nan)
    if start is row or name not in row["attributes"]:
        return risen
    return risen + row["attributes_before"][name] - start["attributes_before"][name]


def total(rows: list[Row]) -> str:
    """Return what all runs have taken: training, evaluation, and data of their own."""
    hours = sum(row["seconds"] for row in rows) / 3600
    return f"{len(rows)} runs took {hours:.1f} hours, one after the other."


def best_settings(what: Comparison, rows: list[Row]) -> str:
    """Return a line for each method that was tuned: its settings, the best first."""
    found: list[tuple[str, float, str]] = []
    for name in what.methods:
        own, starts = own_and_starts(what, rows, name)
        if (of := what.method(name).setting_of) and own:
            found.append((of, -float(gains(own, starts).mean()), name))
    lines = [
        f"- {of}: {', '.join(f'{name} ({-lost:+.4f})' for _, lost, name in settings)}"
        for of, settings in _grouped(sorted(found))
    ]
    return "\n".join(["Settings, the best first:", "", *lines]) if lines else ""


def _grouped(found: list[tuple[str, float, str]]) -> Any:
    return ((of, [*settings]) for of, settings in groupby(found, key=lambda one: one[0]))

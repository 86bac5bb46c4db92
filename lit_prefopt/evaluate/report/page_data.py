"""Data of the HTML report: its table, its plots, and the rows of its images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.report import plots as page_plots
from lit_prefopt.evaluate.report.pictures import Pictures
from lit_prefopt.evaluate.report.saved_results import (
    ResultRow,
    SavedResults,
    by_prompt,
    interval,
    mapping,
    number,
)
from lit_prefopt.evaluate.statistics import Interval, paired_statistics

MINUS = "\N{MINUS SIGN}"


class TableRow(NamedTuple):
    """One line of the page's table; missing values are None."""

    name: str
    attribute: bool  # of the judge above it
    reference: float | None
    policy: float | None
    difference: float | None
    difference_ci: Interval | None
    win_rate: float | None
    win_rate_ci: Interval | None
    digits: int  # decimals
    reach: float  # value at the ends of its judge's axis

    @property
    def verdict(self) -> str:
        """Whether the interval excludes zero, and on which side."""
        if self.difference_ci is None:
            return "unknown"
        low, high = self.difference_ci
        return "better" if low > 0 else "worse" if high < 0 else "undecided"

    def at(self, value: float) -> float:
        """Return a difference's position on the axis in percent; zero is in the middle."""
        return round(50 + 50 * max(-1.0, min(1.0, value / self.reach)), 2)


def match_rows(results: SavedResults, other: SavedResults) -> list[ResultRow]:
    """Return the other evaluation's rows in the order of this one's."""
    wanted, found = (
        {(row.text, row.seed, row.image): row for row in one.rows} for one in (results, other)
    )
    if wanted.keys() != found.keys():
        raise InputError(
            f"{results.folder} and {other.folder} have different prompts or seeds: "
            "evaluate both with `lit-prefopt test` and the same ones."
        )
    if not set(results.judges) & set(other.judges):
        raise InputError(
            f"{results.folder} and {other.folder} have no judge in common: evaluate both with "
            "`lit-prefopt test` and the same ones."
        )
    return [found[row.text, row.seed, row.image] for row in results.rows]


def model_names(results: SavedResults, other: SavedResults | None) -> dict[str, str]:
    """Return the models' names; policies of two evaluations are named by their runs."""
    names = mapping(results.summary.get("models"))
    result = {key: str(names[key]) for key in ("reference", "policy") if names.get(key)}
    if other is not None:
        result["other"] = str(mapping(other.summary.get("models")).get("policy") or other.name)
    return result


def table_rows(results: SavedResults) -> list[TableRow]:
    """Return the table's rows: every judge, followed by its attributes."""
    summary, result = results.summary, []
    judges = mapping(summary.get("judges"))
    if not judges and number(summary.get("difference")) is not None:
        means = {key: summary.get(f"reward_{key}") for key in ("reference", "policy")}
        judges = {results.judges[0]: summary | means}
    for name, own in judges.items():
        attributes = mapping(mapping(own).get("attributes"))
        summaries = [
            (str(name), mapping(own)),
            *((str(k), mapping(v)) for k, v in attributes.items()),
        ]
        ends = [interval(values.get("difference_ci")) for _, values in summaries]
        reach = max((abs(end) for pair in ends if pair for end in pair), default=0.0) or 1.0
        for place, (label, values) in enumerate(summaries):
            result.append(_line(label, values, place > 0, 1.05 * reach))
    return result


def _line(name: str, values: dict[str, Any], attribute: bool, reach: float) -> TableRow:
    ends = interval(values.get("difference_ci"))
    return TableRow(
        name,
        attribute,
        number(values.get("reference")),
        number(values.get("policy")),
        number(values.get("difference")),
        ends,
        number(values.get("win_rate")),
        interval(values.get("win_rate_ci")),
        _digits(ends),
        reach,
    )


def _digits(ends: Interval | None) -> int:
    """Return the number of decimals that resolves an interval's width, at least three."""
    half = abs(ends[1] - ends[0]) / 2 if ends else 0.0
    return 3 if half == 0 else min(6, max(3, -math.floor(math.log10(half))))


def outcomes(results: SavedResults) -> dict[str, int]:
    """Count the prompts on which the policy is better, equal and worse, by the first judge."""
    found = np.sign(_differences(results, results.judges[0]))
    names = {"better": 1, "equal": 0, "worse": -1}
    return {name: int((found == sign).sum()) for name, sign in names.items()} if len(found) else {}


def _differences(results: SavedResults, judge: str) -> NDArray[np.float64]:
    return by_prompt(results.rows, [row.difference(judge) for row in results.rows])


def categories(results: SavedResults, judge: str) -> list[page_plots.MeanDifference]:
    """Return the differences by category, the largest first."""
    result = []
    for name, values in mapping(results.summary.get("categories")).items():
        own = mapping(mapping(values).get(judge))
        value, ends = number(own.get("difference")), interval(own.get("difference_ci"))
        if value is not None and ends is not None:
            result.append(page_plots.MeanDifference(str(name), value, ends))
    return sorted(result, key=lambda row: -row.value)


def draw_plots(results: SavedResults, lines: Sequence[TableRow]) -> list[dict[str, Any]]:
    """Return the plots, each with its title and the number of its judge.

    Args:
        results: The evaluation.
        lines: As `table_rows` returns them.
    """
    result = []
    for place, judge in enumerate(results.judges):
        own = _differences(results, judge)
        if np.count_nonzero(own) > 1:
            result.append(_plot("Prompt by prompt", page_plots.histogram(f"h{place}", own), place))
        rows = categories(results, judge)
        if rows:
            result.append(_plot("By category", page_plots.intervals(f"c{place}", rows), place))
    for place, levels in enumerate(_levels(lines)):
        if levels:
            result.append(_plot("Attributes", page_plots.levels(f"a{place}", levels), place))
    points = results.summary.get("held_out_accuracy")
    found = [interval(point) for point in points] if isinstance(points, list) else []
    known = [point for point in found if point is not None]
    if known:
        result.append(_plot("During training", page_plots.curve("v", known), None))
    return result


def _levels(lines: Sequence[TableRow]) -> list[list[tuple[str, float, float]]]:
    """Return every judge's attributes with both means."""
    result: list[list[tuple[str, float, float]]] = []
    for line in lines:
        if not line.attribute:
            result.append([])
        elif line.reference is not None and line.policy is not None:
            result[-1].append((line.name, line.reference, line.policy))
    return result


def _plot(title: str, drawing: str, judge: int | None) -> dict[str, Any]:
    return {"title": title, "svg": Markup(drawing), "judge": judge}


def compare_policies(
    results: SavedResults, also: Sequence[ResultRow], lines: Sequence[TableRow]
) -> list[TableRow]:
    """Compare this policy with another evaluation's, by the judges that both have.

    Args:
        results: This policy's.
        also: The other's rows, in the same order.
        lines: Give the decimals of a judge's numbers.
    """
    digits = {line.name: line.digits for line in lines if not line.attribute}
    paired_rows = [
        own._replace(reference=their.policy) for own, their in zip(results.rows, also, strict=True)
    ]
    result = []
    for judge in results.judges:
        known = [row for row in paired_rows if row.difference(judge) is not None]
        if known:
            theirs = by_prompt(known, [row.reference[judge] for row in known])
            ours = by_prompt(known, [row.policy[judge] for row in known])
            found = paired_statistics(by_prompt(known, [row.difference(judge) for row in known]))
            reach = 1.05 * (max(map(abs, found.difference_ci)) or 1.0)
            means = float(theirs.mean()), float(ours.mean())
            result.append(TableRow(judge, False, *means, *found, digits.get(judge, 3), reach))
    return result


def labelled_values(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings and further measurements as labels and values."""
    for key, value in values.items():
        ends = interval(value)
        label = f"{before}{key}"
        if isinstance(value, dict) and number(value.get("value")) is not None:
            what = f" ({value['what']})" if "what" in value else ""
            span = interval(value.get("ci"))
            sure = f", 95 % interval {span[0]:.4g} to {span[1]:.4g}" if span else ""
            yield f"{label}{what}", f"{value['value']:.4g}{sure}".replace("-", MINUS)
        elif isinstance(value, dict):
            yield from labelled_values(value, f"{label} · ")
        elif ends is not None:
            yield label, f"{ends[0]:.4g} to {ends[1]:.4g}".replace("-", MINUS)
        elif isinstance(value, float):
            yield label, f"{value:.4g}".replace("-", MINUS)
        elif isinstance(value, list):
            yield label, ", ".join(str(part) for part in value)
        elif value is not None:
            yield label, str(value)


def script_data(
    results: SavedResults,
    also: Sequence[ResultRow],
    pictures: Sequence[Pictures],
    lines: Sequence[TableRow],
) -> dict[str, Any]:
    """Return the data of the page's script, one entry per row.

    Args:
        results: This policy's.
        also: Another's rows in the same order, or none.
        pictures: The rows' pictures.
        lines: Give the decimals of a judge's numbers.
    """
    digits = {line.name: line.digits for line in lines if not line.attribute}
    rows = []
    for place, (row, own) in enumerate(zip(results.rows, pictures, strict=True)):
        sides = [(row.reference, row.attributes_reference), (row.policy, row.attributes_policy)]
        sides += [(their.policy, their.attributes_policy) for their in also[place : place + 1]]
        names = dict.fromkeys(name for _, attributes in sides for name in attributes)
        rows.append(
            {
                "text": row.text,
                "seed": row.seed,
                "prompt": row.prompt,
                "image": row.image,
                "category": row.category,
                "scores": [[side.get(judge) for side, _ in sides] for judge in results.judges],
                "attributes": {name: [side.get(name) for _, side in sides] for name in names},
                "pictures": own,
            }
        )
    return {
        "judges": [{"name": name, "digits": digits.get(name, 3)} for name in results.judges],
        "sides": ["reference", "policy", *(["other"] if also else [])],
        "categories": sorted({row.category for row in results.rows if row.category is not None}),
        "rows": rows,
    }

"""Plots of the HTML report, as SVG with the page's colours and font."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.evaluate.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each is replaced by a variable of the page's style sheet: light and dark share one drawing.
INK, MUTED, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lit-prefopt",  # the same results give the same page
    "text.parse_math": False,  # a category may contain a dollar sign
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH, LABEL = 4.6, 26  # inches; characters of a label


class MeanDifference(NamedTuple):
    """A labelled mean difference with its interval."""

    label: str
    value: float
    interval: Interval


def histogram(name: str, differences: NDArray[np.float64]) -> str:
    """Draw a histogram of the prompts' differences.

    Args:
        name: Tells this drawing from the page's others.
        differences: One per prompt, (P,); not all of them zero.
    """

    def draw(axes: Axes) -> None:
        moved = differences[differences != 0]
        # clip outliers, which would compress all others into two bars
        reach = float(np.quantile(np.abs(moved), 0.98))
        # zero is between two bars and ties are excluded: no bar mixes wins and losses
        half = min(20, max(4, round(len(differences) ** 0.5)))
        edges = np.linspace(-reach, reach, 2 * half + 1)
        counts, _ = np.histogram(moved.clip(-reach, reach), edges)
        colours = [MUTED] * half + [ACCENT] * half
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=colours)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axvline(float(differences.mean()), color=ACCENT, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_xlabel("policy less reference; the outermost bars hold all beyond")
        axes.set_ylabel("prompts")

    best, worst = float(differences.max()), float(differences.min())
    description = f"Differences of {len(differences)} prompts, from {worst:+.3f} to {best:+.3f}."
    return _svg(name, 2.6, description, draw)


def intervals(name: str, rows: Sequence[MeanDifference]) -> str:
    """Draw mean differences and their intervals, one per line.

    Args:
        name: Tells this drawing from the page's others.
        rows: From top to bottom.
    """

    def draw(axes: Axes) -> None:
        places = range(len(rows))[::-1]
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, row in zip(places, rows, strict=True):
            clear = row.interval[0] > 0 or row.interval[1] < 0
            colour = ACCENT if clear else MUTED
            axes.plot(row.interval, (place, place), color=colour, linewidth=2)
            axes.plot(row.value, place, "o", color=colour, markersize=5)
        axes.set_yticks(list(places), [_label(row.label) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("policy less reference, 95 % interval")

    description = "; ".join(f"{row.label}: {row.value:+.3f}" for row in rows[:20])
    return _svg(name, 0.75 + 0.26 * len(rows), description, draw)


def levels(name: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """Draw the means of reference and policy, one pair per line.

    Args:
        name: Tells this drawing from the page's others.
        rows: From top to bottom: the label, the reference's mean, the policy's.
    """

    def draw(axes: Axes) -> None:
        places = range(len(rows))[::-1]
        for place, (_, reference, policy) in zip(places, rows, strict=True):
            axes.plot((reference, policy), (place, place), color=ACCENT, linewidth=2)
            axes.plot(reference, place, "o", color=MUTED, markersize=5)
            axes.plot(policy, place, "o", color=ACCENT, markersize=6)
        axes.set_yticks(list(places), [_label(row[0]) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("mean: reference grey, policy coloured")

    description = "; ".join(f"{row[0]}: {row[1]:.3f} to {row[2]:.3f}" for row in rows[:20])
    return _svg(name, 0.75 + 0.26 * len(rows), description, draw)


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw the held-out accuracy over the training steps.

    Args:
        name: Tells this drawing from the page's others.
        points: Steps and accuracies.
    """

    def draw(axes: Axes) -> None:
        axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        across = axes.get_yaxis_transform()
        axes.text(1, 0.5, "chance", transform=across, ha="right", va="bottom", color=MUTED)
        axes.plot(*zip(*points, strict=True), "o-", color=ACCENT, markersize=4, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy on held-out pairs")

    step, accuracy = points[-1]
    return _svg(name, 2.6, f"Accuracy {accuracy:.3f} at step {step:.0f}.", draw)


def _label(text: str) -> str:
    """Shorten a label to one line beside a plot."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else line[: LABEL - 1] + "…"


def _svg(name: str, height: float, description: str, draw: Callable[[Any], None]) -> str:
    """Return a drawing as an <svg> element.

    Args:
        name: Prefix of the identifiers inside it, unique in the page.
        height: In inches.
        description: Text for screen readers.
        draw: Draws into the axes.
    """
    # imported here, since it is slow; Figure instead of pyplot, which looks for a display
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's font may lack a character
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        axes.tick_params(length=3)
        draw(axes)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)

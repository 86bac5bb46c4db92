"""Report of all rounds: table and plot of the reward, and images of the same prompts by round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.console import picture_name
from lit_prefopt.evaluate.statistics import Interval, paired_statistics
from lit_prefopt.utils.atomic_files import atomic_file, write_atomic

MARGIN, CAPTION = 80, 16  # pixels of the sheet beside and between its images


class RoundRow(NamedTuple):
    """One round compared with the initial model, on the same prompts."""

    name: str
    reward: float
    difference: float
    difference_ci: Interval
    win_rate: float
    win_rate_ci: Interval


def write_round_report(folders: Sequence[Path], output: Path) -> None:
    """Print the table and write `rounds.json`, `rounds.png` and `samples.png`.

    Args:
        folders: The rounds, each with its `evaluation/`.
        output: Output folder.
    """
    results = [folder / "evaluation" for folder in folders]
    if not all((folder / "per_prompt.jsonl").exists() for folder in results):
        print(
            f"Rounds: {output}. They have no evaluation to compare them by; add one with "
            "`--fit_arguments+=--trainer.callbacks+=Evaluation`, with its judge and prompts."
        )
        return
    start, after = _rewards(results)
    rows = [_row(folder.name, start, own) for folder, own in zip(folders, after, strict=True)]
    base = float(start.mean())
    report = {"reward_start": base, "prompts": len(start), "rounds": [r._asdict() for r in rows]}
    write_atomic(output / "rounds.json", json.dumps(report, indent=2) + "\n")
    _plot(base, rows, output / "rounds.png")
    _sheet(results, output / "samples.png")
    Console(markup=False).print(_table(base, rows))
    print(f"Results: {output}/rounds.json, rounds.png, samples.png")


def _rewards(results: Sequence[Path]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Return the rewards before the first round (N,), and after each one."""
    found = [_rows(folder) for folder in results]
    keys = [[(row["text"], row["seed"]) for row in rows] for rows in found]
    if any(one != keys[0] for one in keys):
        raise InputError(
            f"The rounds in {results[0].parent.parent} were evaluated on different prompts or "
            "seeds: evaluate each with `lit-prefopt test` and the same ones."
        )
    start = _by_prompt(found[0], "reward_reference")
    return start, [_by_prompt(rows, "reward_policy") for rows in found]


def _by_prompt(rows: list[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """Return the mean of each prompt's images, (N,)."""
    numbers = [row["prompt"] for row in rows]
    _, places = np.unique(numbers, return_inverse=True)
    rewards = np.array([row[name] for row in rows], np.float64)
    return np.bincount(places, rewards) / np.bincount(places)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "per_prompt.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [_parsed(json.loads(line), place) for place, line in enumerate(lines)]
    except (ValueError, LookupError, TypeError, RecursionError):
        rows = []
    if not rows:
        raise InputError(
            f"{path} is damaged: remove {folder.parent / 'done'} and start `lit-prefopt rounds` "
            "again with the same arguments, which evaluates the round again."
        )
    return rows


def _parsed(row: dict[str, Any], place: int) -> dict[str, Any]:
    """Return what the report needs; a row without a number is its own prompt."""
    rewards = {name: float(row[name]) for name in ("reward_reference", "reward_policy")}
    return {
        "text": row["text"],
        "seed": row["seed"],
        "prompt": int(row.get("prompt", place)),
    } | rewards


def _row(name: str, start: NDArray[np.float64], after: NDArray[np.float64]) -> RoundRow:
    return RoundRow(name, float(after.mean()), *paired_statistics(after - start))


def _table(base: float, rows: Sequence[RoundRow]) -> Table:
    result = Table(title="Reward by round, against the model that the first one started from")
    for heading in ("", "reward", "difference", "95 % interval", "win rate", "95 % interval"):
        result.add_column(heading, justify="left" if heading == "" else "right")
    result.add_row("start", f"{base:.3f}", "", "", "", "")
    for row in rows:
        intervals = (row.difference_ci, row.win_rate_ci)
        gained, won = (f"{low:+.3f} to {high:+.3f}" for low, high in intervals)
        cells = [f"{row.reward:.3f}", f"{row.difference:+.3f}", gained, f"{row.win_rate:.3f}"]
        result.add_row(row.name, *cells, won.replace("+", ""))
    return result


def _plot(base: float, rows: Sequence[RoundRow], path: Path) -> None:
    # imported here, since it is slow; Figure instead of pyplot, which looks for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = range(len(rows) + 1)
    rewards = [base, *(row.reward for row in rows)]
    low = [0.0, *(row.difference - row.difference_ci[0] for row in rows)]
    high = [0.0, *(row.difference_ci[1] - row.difference for row in rows)]
    axes.errorbar(numbers, rewards, yerr=[low, high], marker="o", capsize=4)
    axes.axhline(base, linestyle=":", color="grey")
    axes.set_xticks(numbers, ["start", *(row.name for row in rows)])
    axes.set_ylabel("mean reward; 95 % interval of the difference")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _sheet(results: Sequence[Path], path: Path, width: int = 128) -> None:
    """Write a sheet with a column per prompt: the initial model's image, then each round's."""
    first = results[0] / "images"
    lines = [("start", sorted(first.glob(picture_name("*", "reference"))))]
    for folder in results:
        found = sorted((folder / "images").glob(picture_name("*", "policy")))
        lines.append((folder.parent.name, found))
    columns = min(len(files) for _, files in lines)
    tile = width + CAPTION
    sheet = Image.new("RGB", (MARGIN + columns * (width + 4), len(lines) * tile), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, files) in enumerate(lines):
        draw.text((4, number * tile + width // 2), name, fill="black")
        for column, file in enumerate(files[:columns]):
            with Image.open(file) as image:
                shrinks = image.width > width
                way = Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST
                at = (MARGIN + column * (width + 4), number * tile)
                sheet.paste(image.resize((width, width), way), at)
    with atomic_file(path) as stream:
        sheet.save(stream, "PNG")

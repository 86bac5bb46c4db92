"""Read an evaluation's saved results, for reports and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.statistics import Interval

ONLY_JUDGE = "reward"  # the name of an unnamed judge
LARGEST = 1e100  # the difference of two numbers and its square can be computed
Scores = dict[str, float | None]


class ResultRow(NamedTuple):
    """One image of each model for one prompt, with their scores."""

    text: str
    seed: int | None
    prompt: int
    image: int
    category: str | None
    reference: Scores  # by judge
    policy: Scores
    attributes_reference: Scores
    attributes_policy: Scores
    picture_reference: Path | None
    picture_policy: Path | None

    def difference(self, judge: str) -> float | None:
        """Return the policy's score minus the reference's, or None if one is missing."""
        reference, policy = self.reference.get(judge), self.policy.get(judge)
        return None if reference is None or policy is None else policy - reference


class SavedResults(NamedTuple):
    """An evaluation's summary and its rows."""

    folder: Path
    summary: dict[str, Any]
    judges: list[str]
    rows: list[ResultRow]

    @property
    def name(self) -> str:
        """Name of the evaluation: its policy's run or file, or else its own run."""
        policy = Path(str(mapping(self.summary.get("models")).get("policy", "")))
        run = policy.parents[1] if policy.suffix == ".ckpt" and len(policy.parts) > 2 else policy
        folder = self.folder.resolve()
        return run.name or folder.parent.name or folder.name


def read_results(folder: Path) -> SavedResults:
    """Read an evaluation's results, in the current format or an earlier one.

    Args:
        folder: Folder with `evaluation.json` and, for the rows, `per_prompt.jsonl`.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise InputError(
            f"{folder} contains no evaluation.json; name the folder of an evaluation, such as "
            "runs/quickstart/evaluation."
        )
    summary = mapping(_parsed(_text(path), path))
    judges = [str(name) for name in mapping(summary.get("judges"))] or [ONLY_JUDGE]
    lines = folder / "per_prompt.jsonl"
    rows = []
    if lines.is_file():
        written = _text(lines).split("\n")  # a prompt may contain U+2028
        records = [mapping(_parsed(line, lines)) for line in written if line.strip()]
        rows = [_row(folder, number, record, judges) for number, record in enumerate(records)]
    return SavedResults(folder, summary, judges, rows)


def by_prompt(rows: list[ResultRow], values: list[float | None]) -> NDArray[np.float64]:
    """Return the mean of the values of each prompt's images, (P,), without missing ones.

    Args:
        rows: Give the prompt of each value.
        values: One per row; None if it is missing.
    """
    found: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            found.setdefault(row.prompt, []).append(value)
    return np.array([sum(own) / len(own) for own in found.values()], dtype=np.float64)


def number(value: Any) -> float | None:
    """Return a finite number unchanged, and None for anything else, such as one out of range."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and abs(value) < LARGEST else None  # false for NaN


def interval(value: Any) -> Interval | None:
    """Return an interval unchanged, and None for anything else."""
    ends = [number(end) for end in value] if isinstance(value, list | tuple) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping unchanged, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not a text in UTF-8; run the evaluation again with `lit-prefopt test`."
        ) from error


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN is not valid JSON
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is incomplete ({error}); run the evaluation again with `lit-prefopt test`."
        ) from error


def _row(folder: Path, place: int, record: dict[str, Any], judges: list[str]) -> ResultRow:
    seed, prompt, image = (record.get(key) for key in ("seed", "prompt", "image"))
    category = record.get("category")
    return ResultRow(
        str(record.get("text", "")),
        seed if isinstance(seed, int) else None,
        prompt if isinstance(prompt, int) else place,
        image if isinstance(image, int) else 0,
        None if category is None else str(category),
        _scores(record, "reference", judges),
        _scores(record, "policy", judges),
        _numbers(record.get("attributes_reference")),
        _numbers(record.get("attributes_policy")),
        _picture(folder, place, record, "reference"),
        _picture(folder, place, record, "policy"),
    )


def _scores(record: dict[str, Any], model: str, judges: list[str]) -> Scores:
    found = {judges[0]: number(record.get(f"reward_{model}"))}
    named = mapping(record.get(f"scores_{model}"))
    return found | {name: number(named[name]) for name in judges if name in named}


def _numbers(value: Any) -> Scores:
    return {str(name): number(own) for name, own in mapping(value).items()}


def _picture(folder: Path, place: int, record: dict[str, Any], model: str) -> Path | None:
    """Return the path of a row's image, if it exists inside the evaluation's folder."""
    # default names of an earlier format
    named = record.get(f"picture_{model}", f"images/{place:05d}-{model}.png")
    if not isinstance(named, str):
        return None
    path = (folder / named).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None

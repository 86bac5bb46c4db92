"""Difficulty of a stored pair: the gap between its two sides, read from its .json."""

from __future__ import annotations

from array import array
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.reader import Sample
from lit_prefopt.errors import quoted

By = Literal["rank", "gap"]
BY_SIDE = ("chosen", "rejected")
MOST = 1e300  # the difference of two larger scores could overflow
IN_ORDER = ("seeds", "ranks", "scores")  # lists with a value for either side


class Difficulty(NamedTuple):
    """Gap between the two sides of a pair; negative if the rejected side is rated higher."""

    gap: float  # in ranks or in score
    images: int  # number of ranked images; 0 for a gap of scores


class DifficultyArray:
    """Difficulties of many pairs, stored in twelve bytes each."""

    def __init__(self) -> None:
        self._gaps, self._images = array("d"), array("i")

    def add(self, one: Difficulty) -> None:
        """Append the difficulty of a pair."""
        self._gaps.append(one.gap)
        self._images.append(one.images)

    @property
    def gaps(self) -> NDArray[np.float64]:
        """All gaps, (pairs,); NaN for a broken pair."""
        return np.asarray(self._gaps)

    @property
    def images(self) -> NDArray[np.int64]:
        """Number of ranked images, (pairs,)."""
        return np.asarray(self._images, np.int64)


def difficulty(sample: Sample, by: By) -> Difficulty:
    """Return the difficulty of a pair; raise BrokenSample if its .json does not hold it.

    Args:
        sample: The pair as stored.
        by: `rank` reads `rank_gap` and `images`; `gap` reads `scores`, or else `gap`.
    """
    if by == "rank":
        return _by_rank(sample)
    scores = sample.meta.get("scores")
    if isinstance(scores, dict) and all(_is_number(scores.get(side)) for side in BY_SIDE):
        return Difficulty(scores["chosen"] - scores["rejected"], 0)
    if _is_number(sample.meta.get("gap")):
        return Difficulty(sample.meta["gap"], 0)
    raise BrokenSample(
        f"{sample.name} has neither `scores` of its chosen and rejected side nor a `gap` in its "
        ".json: generate ranked pairs, or convert a source that holds scores"
    )


def swapped(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the .json metadata of a pair whose sides were swapped."""
    turned = {name: _turned(name, value) for name, value in meta.items()}
    return turned | {"swapped": True}


def _by_rank(sample: Sample) -> Difficulty:
    gap, images = sample.meta.get("rank_gap"), sample.meta.get("images")
    if gap is None or images is None:
        raise BrokenSample(
            f"{sample.name} has no `rank_gap` and `images` in its .json: generate ranked pairs, or "
            "sort by score with `--by gap`"
        )
    if type(gap) is not int or type(images) is not int or not abs(gap) < images < 2**31:
        raise BrokenSample(
            f"{sample.name} has the rank_gap {quoted(gap)} for {quoted(images)} images, "
            "but it must be less than their number: fix the .json, or sort by score with `--by gap`"
        )
    return Difficulty(gap, images)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MOST


def _turned(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == set(BY_SIDE):
            return {"chosen": value["rejected"], "rejected": value["chosen"]}
        return {key: _turned(key, inner) for key, inner in value.items()}
    if name in ("gap", "rank_gap") and _is_number(value):
        return -value
    if name in IN_ORDER and isinstance(value, list) and len(value) == 2:
        return value[::-1]
    return value

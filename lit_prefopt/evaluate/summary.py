"""Summary statistics of an evaluation's rows, with intervals over the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.evaluate.rows import SIDES, ComparisonRow, ImageScores
from lit_prefopt.evaluate.statistics import bootstrap_interval, paired_statistics

FORMAT = 2
Values = NDArray[np.float64]
SIMILARITY = "cosine of the image features of a CLIP, policy against reference"
DIVERSITY = "mean cosine of the image features of a CLIP among the images of a prompt"


def summarise(rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    """Compute means, medians, paired differences and win rates, with 95 % intervals.

    Several images of a prompt are averaged first: the unit of resampling and counting is the
    prompt. A prompt is won if its mean difference is above zero; a tie counts one half. Images to
    which an attribute does not apply are excluded from it.

    Args:
        rows: At least one; the judges are the same in all.
    """
    names = list(rows[0].policy.scores)
    judges = {name: _judge(rows, name) for name in names}
    copied = ("difference", "difference_ci", "win_rate", "win_rate_ci", "attributes")
    first = judges[names[0]]
    prompts = len(_places(rows)[0])
    return {
        "format": FORMAT,
        "prompts": prompts,
        "images_per_prompt": len(rows) // prompts,
        **{f"reward_{side}": first[side] for side in SIDES},
        **{name: first[name] for name in copied},
        "judges": judges,
        "categories": _categories(rows, names),
        "drift": _drift(rows),
        "diversity": _diversity(rows),
        "ocr": _reading(rows),
    }


def _judge(rows: Sequence[ComparisonRow], name: str) -> dict[str, Any]:
    reference, policy = _by_side(rows, partial(_score, judge=name))
    result: dict[str, Any] = {"reference": float(reference.mean()), "policy": float(policy.mean())}
    result |= {
        f"median_{s}": float(np.median(v)) for s, v in zip(SIDES, (reference, policy), strict=True)
    }
    difference = _difference(rows, partial(_score, judge=name))
    ties = int((difference == 0).sum())
    return (
        result
        | paired_statistics(difference)._asdict()
        | {"ties": ties, "attributes": _attributes(rows, name)}
    )


def _attributes(rows: Sequence[ComparisonRow], judge: str) -> dict[str, Any]:
    result = {}
    for name in rows[0].policy.attributes.get(judge, {}):
        found = _paired(rows, partial(_attribute, judge=judge, name=name))
        if found is not None:
            found.pop("prompts")
            result[name] = found
    return result


def _score(judged: ImageScores, judge: str) -> float:
    return judged.scores[judge]


def _attribute(judged: ImageScores, judge: str, name: str) -> float | None:
    return judged.attributes[judge][name]


def _paired(
    rows: Sequence[ComparisonRow], value: Callable[[ImageScores], float | None]
) -> dict[str, Any] | None:
    """Return both means and their difference, over images with a value on both sides."""
    both = [r for r in rows if value(r.reference) is not None and value(r.policy) is not None]
    if not both:
        return None
    reference, policy = _by_side(both, value)
    difference = _difference(both, value)
    return {
        "prompts": len(difference),
        "reference": float(reference.mean()),
        "policy": float(policy.mean()),
        "difference": float(difference.mean()),
        "difference_ci": bootstrap_interval(difference),
    }


def _categories(rows: Sequence[ComparisonRow], names: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for category in dict.fromkeys(row.category for row in rows if row.category is not None):
        own = [row for row in rows if row.category == category]
        result[category] = {"prompts": len(_places(own)[0])} | {
            name: paired_statistics(_difference(own, partial(_score, judge=name)))._asdict()
            for name in names
        }
    return result


def _drift(rows: Sequence[ComparisonRow]) -> dict[str, Any] | None:
    """Return the similarity of the policy's images to the reference's of the same seed."""
    found = np.array([row.similarity for row in rows], dtype=np.float64)
    if np.isnan(found).any():
        return None
    values = _means(rows, found)
    return {"what": SIMILARITY, "value": float(values.mean()), "ci": bootstrap_interval(values)}


def _diversity(rows: Sequence[ComparisonRow]) -> dict[str, Any] | None:
    """Return the similarity among the images of a prompt: the lower, the more diverse."""
    found = _paired(rows, lambda judged: judged.alike)
    return None if found is None else {"what": DIVERSITY, **found}


def _reading(rows: Sequence[ComparisonRow]) -> dict[str, Any] | None:
    """Return the share of images in which the quoted text is found."""
    return _paired(rows, lambda judged: judged.read)


def _places(rows: Sequence[ComparisonRow]) -> tuple[NDArray, NDArray]:
    """Return the prompts' numbers, (P,), and each row's index into them, (N,)."""
    return np.unique([row.prompt for row in rows], return_inverse=True)


def _means(rows: Sequence[ComparisonRow], values: Values) -> Values:
    """Return the mean of each prompt's values, (P,)."""
    _, places = _places(rows)
    means: Values = np.bincount(places, values) / np.bincount(places)
    return means


def _by_side(
    rows: Sequence[ComparisonRow], value: Callable[[ImageScores], float | None]
) -> tuple[Values, Values]:
    """Return the means by prompt, (P,), of the reference and of the policy."""
    reference, policy = (
        _means(rows, np.array([value(getattr(row, side)) for row in rows], dtype=np.float64))
        for side in SIDES
    )
    return reference, policy


def _difference(
    rows: Sequence[ComparisonRow], value: Callable[[ImageScores], float | None]
) -> Values:
    """Return the mean difference of each prompt, (P,): exactly 0 if all images tie."""
    gained = [_minus(value(row.policy), value(row.reference)) for row in rows]
    return _means(rows, np.array(gained, dtype=np.float64))


def _minus(policy: float | None, reference: float | None) -> float:
    assert policy is not None
    assert reference is not None
    return policy - reference

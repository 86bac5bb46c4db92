"""Form pairs from records: match images, choose the better one, label ties."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal, NamedTuple

from lit_prefopt.prepare.records import Record

Matches = Literal["all", "best-worst"]
Ties = Literal["drop", "keep", "soft"]


class RecordPair(NamedTuple):
    """Two images of a record, by index, and the metadata for the pair's .json."""

    chosen: int
    rejected: int
    tie: bool
    meta: dict[str, Any]


def pairs_from_record(record: Record, matches: Matches, ties: Ties) -> Iterator[RecordPair]:
    """Yield the pairs of a record, including ties, which the caller drops and counts.

    Args:
        record: A prompt with its images and their ratings.
        matches: All pairs of a list, or its best image against its worst.
        ties: Whether probabilities decide (soft), and whether ties get the label 0.5 (keep, soft).
    """
    order = sorted(range(len(record.images)), key=lambda image: -record.worths[image])
    met = list(combinations(order, 2)) if matches == "all" else [(order[0], order[-1])]
    for better, worse in met if len(order) > 1 else []:
        probability = record.probability(better, worse) if ties == "soft" else None
        if probability is None:
            tie = record.worths[better] == record.worths[worse]
            yield RecordPair(better, worse, tie, _meta(record, better, worse, 0.5 if tie else None))
            continue
        if probability < 0.5:
            better, worse, probability = worse, better, 1 - probability
        label = round(probability, 6) if probability < 1 else None
        yield RecordPair(better, worse, probability == 0.5, _meta(record, better, worse, label))


def _meta(record: Record, better: int, worse: int, label: float | None) -> dict[str, Any]:
    """Return gap, ranks and scores of both sides, the label if it is not 1, and the weight."""
    meta: dict[str, Any] = {}
    if record.ratings:
        meta["gap"] = record.worths[better] - record.worths[worse]
    for rating, values in record.ratings.items():
        meta[rating] = {"chosen": values[better], "rejected": values[worse]}
    if label is not None:
        meta["label"] = label
    if record.weight is not None:
        meta["weight"] = record.weight
    return meta

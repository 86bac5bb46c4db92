"""Form ranked lists and single images with likes from records, where `form_pairs` forms pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lit_prefopt.data.shards.sides import spread
from lit_prefopt.prepare.form_pairs import Matches, Ties, pairs_from_record
from lit_prefopt.prepare.records import Record

Samples = Literal["pairs", "lists", "likes"]


class RecordSample(NamedTuple):
    """Images of a record that are written as one sample, and the metadata for its .json."""

    images: tuple[int, ...]  # indices in the record, the best first
    tie: bool  # whether no image is better than another
    meta: dict[str, Any]


def samples_from_record(
    record: Record, usable: Sequence[int], kind: Samples, matches: Matches, ties: Ties
) -> Iterator[RecordSample]:
    """Yield the samples of a record, including ties, which the caller drops and counts.

    Args:
        record: A prompt with its images and their ratings, or one image with its label.
        usable: Indices of the images that are not broken; a list has these.
        kind: What to form.
        matches: Which pairs of a list, for `pairs`.
        ties: See `pairs_from_record`.
    """
    if kind == "pairs":
        for one in pairs_from_record(record, matches, ties):
            yield RecordSample((one.chosen, one.rejected), one.tie, one.meta)
    elif kind == "likes":
        yield RecordSample((0,), tie=False, meta=_liked_meta(record))
    elif len(usable) > 1:
        order = sorted(usable, key=lambda image: -record.worths[image])
        yield _ranked_list(record, order)


def shortened_list(record: Record, sample: RecordSample, size: int) -> RecordSample | None:
    """Return a ranked list of so many images, or None if it has fewer.

    Args:
        record: Its record.
        sample: The list.
        size: Number of images, at least 2: the best, the worst, and those at even steps between.
    """
    if len(sample.images) < size:
        return None
    return _ranked_list(
        record, [sample.images[place] for place in spread(len(sample.images), size)]
    )


def _ranked_list(record: Record, order: list[int]) -> RecordSample:
    """Return a list with the ratings of its images; scores are win rates if the source has none."""
    meta: dict[str, Any] = {
        name: [values[image] for image in order] for name, values in record.ratings.items()
    }
    if "scores" not in meta:
        meta["scores"] = [_win_rate(record, image, order) for image in order]
    meta["gap"] = meta["scores"][0] - meta["scores"][-1]
    if record.weight is not None:
        meta["weight"] = record.weight
    worths = [record.worths[image] for image in order]
    return RecordSample(tuple(order), worths[0] == worths[-1], meta)


def _win_rate(record: Record, image: int, order: Sequence[int]) -> float:
    """Return the mean probability that an image is better than another one of its list."""
    wins = [_probability(record, image, other) for other in order if other != image]
    return round(sum(wins) / len(wins), 6)


def _probability(record: Record, one: int, other: int) -> float:
    known = record.probability(one, other)
    if known is not None:
        return known
    ahead = record.worths[one] - record.worths[other]
    return 0.5 if ahead == 0 else float(ahead > 0)


def _liked_meta(record: Record) -> dict[str, Any]:
    meta: dict[str, Any] = {"label": int(record.worths[0])}
    meta |= {name: values for name, values in record.ratings.items() if name == "scores"}
    if record.weight is not None:
        meta["weight"] = record.weight
    return meta

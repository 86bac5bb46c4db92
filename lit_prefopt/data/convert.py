"""From files of preferences to shards: pairs of paths, or ranked lists of images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_prefopt.data.images import BrokenSample, decode
from lit_prefopt.data.records import Columns, Ranked, read_ranked, read_records
from lit_prefopt.data.writer import ShardWriter
from lit_prefopt.errors import InputError


class Summary(NamedTuple):
    """What a conversion did."""

    pairs: int
    ties: int
    images: int
    broken: list[str]  # images that could not be read, with the reasons

    def __str__(self) -> str:
        """Return the counts, and the broken images, a line each."""
        counts = f"{self.pairs} pairs from {self.images} images, {self.ties} ties left out"
        return "\n".join([counts, *(f"left out: {name}" for name in self.broken)])


def convert(
    source: str,
    output: str,
    pairs: Literal["all", "best-worst"] = "all",
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    images: str = "images",
    ranking: str = "ranking",
    scores: str = "scores",
    max_count: int = 10_000,
    max_size: int = 1_000_000_000,
) -> Summary:
    """Make shards from a file of preferences: pairs of image paths, or ranked lists of images.

    A record that has images is a ranked list, one that has a chosen and a rejected image a pair.

    Args:
        source: A .jsonl file with a record a line, or a .json file with one record or a list.
            Paths of images are relative to it.
        output: The folder of shards to be made.
        pairs: What becomes of a ranked list: all its pairs, or its best against its worst image.
        prompt: Key of the text.
        chosen: Key of the better image's path.
        rejected: Key of the worse image's path.
        images: Key of a ranked list's paths.
        ranking: Key of a ranked list's ranks: 1 is best, equal ranks are a tie.
        scores: Key of a ranked list's scores: higher is better. Where ranks are known they decide.
        max_count: Most pairs in a shard.
        max_size: Most bytes in a shard.
    """
    columns = Columns(prompt, chosen, rejected, images, ranking, scores)
    ties, seen, broken = 0, 0, dict[str, None]()
    with ShardWriter(output, max_count, max_size) as writer:
        for where, record in read_records(Path(source)):
            text, ranked = read_ranked(where, record, columns, Path(source).parent)
            files = _load(ranked, broken)
            seen += len(files)
            for best, worst in _matches(ranked, pairs):
                if best.worth == worst.worth:
                    ties += 1
                elif best.path in files and worst.path in files:
                    writer.add(text, files[best.path], files[worst.path], _meta(best, worst))
        if not writer.samples:
            raise InputError(
                f"{source} gives no pair ({ties} ties, {len(broken)} broken images"
                f"{''.join(f'; {name}' for name in list(broken)[:3])}); check its images and ranks."
            )
    summary = Summary(writer.samples, ties, seen, list(broken))
    print(summary)
    return summary


def _matches(ranked: list[Ranked], pairs: str) -> Iterator[tuple[Ranked, Ranked]]:
    """Yield the pairs of a list, the better image first."""
    ordered = sorted(ranked, key=lambda image: -image.worth)
    if pairs == "all":
        yield from combinations(ordered, 2)
    elif len(ordered) > 1:
        yield ordered[0], ordered[-1]


def _load(ranked: list[Ranked], broken: dict[str, None]) -> dict[Path, bytes]:
    """Return the bytes of the images that can be decoded, and name the others."""
    files = {}
    for image in ranked:
        try:
            data = image.path.read_bytes()
            decode(data)
            files[image.path] = data
        except OSError as error:
            broken[f"{image.path} cannot be read ({error.strerror})"] = None
        except BrokenSample as error:
            broken[f"{image.path} {error}"] = None
    return files


def _meta(best: Ranked, worst: Ranked) -> dict[str, Any]:
    """Return what a pair's .json holds: its gap, and the ranks and scores of both sides."""
    if not best.facts:
        return {}
    meta: dict[str, Any] = {"gap": best.worth - worst.worth}
    for fact in best.facts:
        meta[f"{fact}s"] = {"chosen": best.facts[fact], "rejected": worst.facts[fact]}
    return meta

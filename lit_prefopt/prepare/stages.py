"""Split pairs into the stages of a curriculum, easiest first, each a folder of shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.data.images import BrokenSample, open_image
from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.data.shards.find import find_pairs
from lit_prefopt.data.shards.format import SIDES, STAGE_FOLDER
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.prepare.counts import NamedCount
from lit_prefopt.prepare.difficulty import By, Difficulty, DifficultyArray, difficulty, swapped
from lit_prefopt.prepare.progress_bar import progress
from lit_prefopt.utils.atomic_files import atomic_output, write_atomic
from lit_prefopt.utils.output_lock import exclusive_output

Cut = Literal["equal-counts", "equal-spacing"]
Winner = Literal["label", "reward"]
SUMMARY = "summary.json"
OUT = -1  # the stage of skipped pairs


@dataclass
class StageSummary:
    """Statistics of a split into stages."""

    by: By
    read: int = 0
    pairs: list[int] = field(default_factory=list)  # in each stage
    gaps: list[tuple[float, float]] = field(default_factory=list)  # smallest and largest of each
    disagreeing: int = 0  # pairs whose rejected side has the higher score
    swapped: int = 0  # those of them whose sides were swapped
    even: int = 0  # pairs of two equal ranks, or with `winner: reward` of two equal scores; skipped
    small: int = 0  # pairs below `least`
    surplus: int = 0  # pairs beyond `most`
    broken: NamedCount = field(default_factory=NamedCount)

    def metadata(self) -> dict[str, Any]:
        """Return the content of summary.json, independent of machine and time."""
        counts = ("read", "pairs", "disagreeing", "swapped", "even", "small", "surplus")
        return {
            "by": self.by,
            **{name: getattr(self, name) for name in counts},
            "gaps": [{"smallest": low, "largest": high} for low, high in self.gaps],
            "broken": {"count": self.broken.count, "first": self.broken.names},
        }

    def summary(self) -> str:
        """Return the summary that is printed at the end."""
        rows = enumerate(zip(self.pairs, self.gaps, strict=True), 1)
        what = "ranks" if self.by == "rank" else "scores"
        lines = [
            f"{STAGE_FOLDER.format(number)}: {count} pairs, gaps of {what} from {low:g} to {high:g}"
            for number, (count, (low, high)) in rows
        ]
        lines += [
            f"{sum(self.pairs)} of {self.read} pairs; left out: {self.small} below `least`, "
            f"{self.surplus} beyond `most`, {self.even} of two equal {what}, "
            f"{self.broken.count} broken",
            f"{self.disagreeing} with the better score on the rejected side, of which "
            f"{self.swapped} were swapped",
        ]
        share = self.disagreeing / max(1, self.read - self.broken.count)
        if share > 0.5:
            lines.append(
                f"Warning: the better score is on the rejected side in {share:.1%} of the pairs. "
                "If people chose the sides, that may be so (a judge of aesthetics agrees with "
                "51.4% of Pick-a-Pic's choices); if the judge did, the sign is reversed."
            )
        return "\n".join([*lines, *(f"broken: {line}" for line in self.broken.lines())])


def split_into_stages(
    shards: str,
    output: str,
    stages: int = 5,
    by: By = "rank",
    cut: Cut = "equal-counts",
    winner: Winner = "label",
    least: float = 0.0,
    most: int | None = None,
    broken_share: float = 0.01,
    max_count: int = 10_000,
    max_size: int = 1_000_000_000,
) -> StageSummary:
    """Sort pairs by difficulty into the stages of a curriculum, for `CurriculumPairs`.

    A large gap between the two sides is easy, a small one hard. OUTPUT/stage-1 gets the easiest
    pairs, and so on; images are copied unchanged. Counts are printed and saved as
    OUTPUT/summary.json. The output folder appears once it is complete.

    Args:
        shards: Folder or URL of pair shards; {000..009} and {a,b} stand for alternatives.
        output: Output folder.
        stages: Number of stages.
        by: Measure of difficulty. `rank`: the difference of the two sides' ranks among the images
            of their prompt, as published, from `rank_gap` and `images` in the pair's .json;
            equal ranks are skipped.
            `gap`: the difference of their scores, from `scores` in the .json, or its `gap`.
        cut: How score gaps become stages: `equal-counts` gives each stage the same number of
            pairs, `equal-spacing` the same range of gaps, as the released code does (its
            `no_chunks` of 6 means 5 stages). Ranks are always cut by the published formula.
        winner: Which side is chosen: with `label` the one that is stored as chosen, with `reward`
            the one with the higher score (or the better rank); `reward` skips pairs of two equal
            scores and drops any `label` in a .json.
        least: Minimum gap; pairs with a smaller one are skipped. In the unit of `by`.
        most: Maximum number of pairs: those with the largest gaps are kept; all by default. The
            released code keeps 150,000 of Pick-a-Pic.
        broken_share: Maximum share of unreadable pairs; 0 stops at the first one.
        max_count: Maximum number of pairs in a shard.
        max_size: Maximum size of a shard in bytes.
    """
    _check(stages, least, most, broken_share, Path(output))
    reader = ShardReader(find_pairs(shards))
    made = StageSummary(by)
    known = _measure(reader, by, broken_share, made)
    made.disagreeing = int((known.gaps < 0).sum())
    kept = _kept(known.gaps, winner, least, most, made)
    where = np.full(made.read, OUT)
    if by == "rank":
        where[kept] = cut_ranks(abs(known.gaps[kept]).astype(np.int64), known.images[kept], stages)
    else:
        where[kept] = cut_gaps(abs(known.gaps[kept]), stages, cut)
    _count(where, known.gaps, stages, cut, made)
    turned = (known.gaps < 0) & (winner == "reward")
    made.swapped = int((turned & (where != OUT)).sum())
    with exclusive_output(output), atomic_output(Path(output)) as folder:
        folder.mkdir()
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardWriter(folder / STAGE_FOLDER.format(n), max_count, max_size)
                )
                for n in range(1, stages + 1)
            ]
            _write(reader, writers, where, turned, winner)
        metadata = json.dumps(made.metadata(), indent=2, ensure_ascii=False)
        write_atomic(folder / SUMMARY, metadata + "\n")
    print(made.summary())
    return made


def cut_gaps(gaps: NDArray[np.float64], stages: int, cut: Cut) -> NDArray[np.int64]:
    """Return the stage of each gap, counted from 0; the largest gaps come first.

    Args:
        gaps: (pairs,) sizes of the gaps.
        stages: Number of stages.
        cut: See `split_into_stages`.
    """
    if cut == "equal-counts":
        order = np.argsort(-gaps, kind="stable")
        numbers = np.empty(len(gaps), np.int64)
        numbers[order] = np.arange(len(gaps)) * stages // max(1, len(gaps))
        return numbers
    bounds = np.linspace(gaps.max(), gaps.min(), stages + 1)[1:]
    # the first stage whose lower bound a gap reaches
    return np.minimum((gaps[:, None] < bounds).sum(1), stages - 1)


def cut_ranks(gaps: NDArray[np.int64], images: NDArray[np.int64], stages: int) -> NDArray[np.int64]:
    """Return the stage of each rank gap, counted from 0.

    Stage k of B, counted from 1, holds the gaps in (L_k, R_k] with L_k = (M - 1)(B - k) / B and
    R_k = (M - 1)(B - k + 1) / B for M images.

    Args:
        gaps: (pairs,) differences of the two ranks, from 1 to M - 1.
        images: (pairs,) M, the number of ranked images.
        stages: B, the number of stages.
    """
    # k = B + 1 - ceil(gap * B / (M - 1)), in integers
    return stages - -(-gaps * stages // (images - 1))


def _check(stages: int, least: float, most: int | None, broken_share: float, output: Path) -> None:
    check_number("stages", stages, 1)
    check_number("least", least, 0)
    check_number("most", most, 1, optional=True)
    check_number("broken_share", broken_share, 0, 1)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; remove it or choose another folder.")


def _measure(
    reader: ShardReader, by: By, broken_share: float, made: StageSummary
) -> DifficultyArray:
    """Read the difficulties of all pairs; broken pairs are counted and get NaN."""
    known = DifficultyArray()
    total = sum(reader.counts)
    for _, sample in progress(_samples(reader), "pairs checked", total):
        made.read += 1
        try:
            if isinstance(sample, str):
                raise BrokenSample(sample)
            known.add(difficulty(sample, by))
        except BrokenSample as error:
            made.broken.add(str(error))
            known.add(Difficulty(float("nan"), 0))
    if not made.read:
        raise InputError("The shards contain no pair; check the path.")
    allowed = max(ALWAYS_ALLOWED, broken_share * made.read) if broken_share else 0
    if made.broken.count > allowed or made.broken.count == made.read:
        raise InputError(
            f"Broken: {made.broken.count} of {made.read} pairs, more than the {broken_share} that "
            f"`broken_share` allows; repair or remove them: {'; '.join(made.broken.lines())}."
        )
    return known


def _kept(
    gaps: NDArray[np.float64], winner: Winner, least: float, most: int | None, made: StageSummary
) -> NDArray[np.bool_]:
    """Return the mask of the pairs to keep, and count the others."""
    kept = np.isfinite(gaps)
    if winner == "reward" or made.by == "rank":  # no stage holds a rank gap of 0
        made.even = int((gaps == 0).sum())
        kept &= gaps != 0
    small = kept & (abs(gaps) < least)
    made.small = int(small.sum())
    kept &= ~small
    made.surplus = max(0, int(kept.sum()) - most) if most else 0
    if made.surplus:
        numbers = np.flatnonzero(kept)
        kept[numbers[np.argsort(-abs(gaps[numbers]), kind="stable")[most:]]] = False
    if not kept.any():
        raise InputError(
            f"None of {made.read} pairs is left: {made.small} have a gap below {least:g}, "
            f"{made.even} two equal scores; lower `--least`."
        )
    return kept


def _count(
    where: NDArray[np.int64], gaps: NDArray[np.float64], stages: int, cut: Cut, made: StageSummary
) -> None:
    """Count the pairs of each stage; raise if one is empty."""
    for stage in range(stages):
        inside = abs(gaps[where == stage])
        if not len(inside):
            cure = "more images of each prompt" if made.by == "rank" else "more pairs"
            if made.by == "gap" and cut == "equal-spacing":
                cure = "`--cut equal-counts`"
            raise InputError(
                f"{STAGE_FOLDER.format(stage + 1)} of {stages} would be empty; use fewer "
                f"`--stages` or {cure}."
            )
        made.pairs.append(len(inside))
        made.gaps.append((float(inside.min()), float(inside.max())))


def _write(
    reader: ShardReader,
    writers: list[ShardWriter],
    where: NDArray[np.int64],
    turned: NDArray[np.bool_],
    winner: Winner,
) -> None:
    for number, sample in progress(_samples(reader), "pairs written", len(where)):
        if where[number] == OUT or isinstance(sample, str):
            continue
        (chosen, rejected), meta = sample.sides, sample.meta
        if winner == "reward":  # the reward decides, without a probability
            meta = {name: value for name, value in meta.items() if name != "label"}
        if turned[number]:
            chosen, rejected, meta = rejected, chosen, swapped(meta)
        writers[where[number]].add(sample.text, chosen, rejected, meta, sample.mask)


def _samples(reader: ShardReader) -> Iterator[tuple[int, Sample | str]]:
    """Yield all samples with their number; a broken one as its error message."""
    number = 0
    for shard, count in enumerate(reader.counts):
        for place in range(count):
            try:
                yield number, _checked(reader(shard, place))
            except BrokenSample as error:
                yield number, str(error)
            number += 1


def _checked(sample: Sample) -> Sample:
    for name, data in zip(SIDES, sample.sides, strict=True):
        try:
            open_image(data)  # reads the header only
        except BrokenSample as error:
            raise BrokenSample(f"{sample.name}: {name} {error}") from error
    return sample

"""The plan at scale: the order of ten million samples on thousands of ranks.

python -m benchmarks.plan_scale --report true

Every batch of every rank and worker is requested as in training, and every returned sample is
counted.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from numpy.typing import NDArray

from benchmarks.common import write_report
from lit_prefopt.data.order.buckets import BucketPlan, bucket_shapes, choose_buckets
from lit_prefopt.data.order.plan import Plan, RankSplit, SampleOrder
from lit_prefopt.data.order.position import EpochProgress, ResumePoint
from lit_prefopt.data.shards.format import Shard
from lit_prefopt.data.shards.index import read_index, write_index

RANKS, WORKERS, BATCH, EPOCH = 4096, 8, 8, 3
Rows = list[tuple[str, str]]


def unequal(shards: int, samples: int) -> NDArray[np.int64]:
    """Return how many samples each shard holds: up to three times as many in one as in another."""
    shares = np.random.default_rng(0).uniform(0.5, 1.5, shards)
    counts = (shares / shares.sum() * samples).astype(np.int64)
    counts[: samples - counts.sum()] += 1
    return counts


def image_sizes(counts: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """Return widths and heights of the best sides: squares, photographs and odd ones."""
    random = np.random.default_rng(1)
    common = np.asarray([(1024, 1024)] * 6 + [(1536, 1024), (1024, 1536), (1344, 768), (768, 1344)])
    sizes = []
    for count in counts:
        drawn = common[random.integers(len(common), size=count)]
        odd = random.random(count) < 0.1
        drawn[odd] = random.integers(512, 2048, (int(odd.sum()), 2))
        sizes.append(drawn.astype(np.int32))
    return sizes


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that an action takes, and the MB at its peak, which are counted apart."""
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 1e6


class Reading:
    """Notes which samples are read, and in which order."""

    def __init__(self, order: SampleOrder, counts: NDArray[np.int64]) -> None:
        self.order = order
        self.starts = np.concatenate(([0], np.cumsum(counts)))
        self.times = np.zeros(int(counts.sum()), np.uint8)
        self.read = 0

    def batch(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the numbers of the samples of one batch."""
        shards, samples = np.asarray(self.order.slice(EPOCH, start, stop)).T
        ids = self.starts[shards] + samples
        np.add.at(self.times, ids, 1)
        self.read += len(ids)
        return ids

    def epoch(self, world: int, stage: tuple[int, int] | None = None) -> Iterator[NDArray]:
        """Yield the batches of all ranks, step by step; `stage`: first position and batches."""
        ranks = [RankSplit(rank, world, BATCH) for rank in range(world)]
        first, batches = stage or (0, self.order.samples // ranks[0].global_batch)
        for number in range(batches):
            for rank in ranks:
                yield self.batch(*rank.rank_positions(first, number))


def everyone(order: SampleOrder, counts: NDArray[np.int64]) -> Rows:
    """Let every rank and worker read an epoch."""
    reading = Reading(order, counts)
    start = time.perf_counter()
    batches = sum(1 for _ in reading.epoch(RANKS))
    seconds = time.perf_counter() - start
    left, queued = order.samples - reading.read, int(counts.sum()) - order.samples
    assert reading.times.max() == 1
    assert batches % RANKS == 0
    assert 0 <= left < RANKS * BATCH
    per_worker = [len(range(w, batches // RANKS, WORKERS)) for w in range(WORKERS)]
    return [
        ("samples read twice", str(int((reading.times > 1).sum()))),
        (f"samples left out, of a global batch of {RANKS * BATCH:,}", f"{left:,}"),
        ("samples left in the queues of buckets", f"{queued:,}"),
        ("batches of every rank", f"{batches // RANKS}"),
        ("batches of its workers", ", ".join(map(str, per_worker))),
        ("time to request a batch", f"{seconds / batches * 1e6:.0f} µs"),
    ]


def same_order(order: SampleOrder, counts: NDArray[np.int64], samples: int) -> Rows:
    """Compare what 1, 7 and all ranks read."""
    orders = []
    for world in (1, 7, RANKS):
        batches = samples // (world * BATCH)
        read = Reading(order, counts).epoch(world, (0, batches))
        orders.append(np.concatenate(list(read)))
    shortest = min(map(len, orders))
    assert all((one[:shortest] == orders[0][:shortest]).all() for one in orders)
    return [(f"samples in the same order on 1, 7 and {RANKS:,} ranks", f"{shortest:,}")]


def other_ranks(order: SampleOrder, counts: NDArray[np.int64]) -> Rows:
    """Change the number of ranks twice in the middle of an epoch."""
    reading = Reading(order, counts)
    position = 0
    for world, share in ((RANKS, 1 / 3), (7, 1 / 2), (RANKS, 1)):  # of what is left
        course = EpochProgress(order.samples, world * BATCH)
        course.resume_point = ResumePoint(0, EPOCH, position)
        stage = course.position_after(0)
        assert stage.epoch == EPOCH
        batches = int(stage.batches * share)
        for _ in reading.epoch(world, (stage.position, batches)):
            pass
        position += batches * world * BATCH
    left = order.samples - reading.read
    assert reading.times.max() == 1
    assert 0 <= left < RANKS * BATCH
    path = f"{RANKS:,} -> 7 -> {RANKS:,} ranks in mid-epoch"
    return [
        (f"{path}: samples read twice", str(int((reading.times > 1).sum()))),
        (f"{path}: samples left out", f"{left:,}"),
    ]


def of_index(counts: NDArray[np.int64], sizes: list[NDArray[np.int32]]) -> Rows:
    """Measure the index of that many samples."""
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for number, (count, known) in enumerate(zip(counts, sizes, strict=True)):
            name, step = f"pairs-{number:06d}.tar", 400_000
            with open(Path(folder) / name, "wb") as file:
                file.truncate(int(count) * step)  # a hole: it takes no room
            offsets = np.arange(count) * step
            shards.append(Shard(name, int(count) * step, offsets, folder, known))
        written, _ = measured(lambda: write_index(folder, shards))
        size = (Path(folder) / "index.json").stat().st_size
        seconds, memory = measured(lambda: read_index(folder))
    return [
        ("index.json", f"{size / 1e6:.0f} MB, written in {written:.1f} s"),
        ("reading it", f"{seconds:.1f} s, {memory:.0f} MB at most"),
    ]


def made(make: Callable[[], SampleOrder]) -> Rows:
    """Measure what one worker of the last rank needs for its first batch."""

    def first_batch() -> None:
        make().slice(EPOCH, *RankSplit(RANKS - 1, RANKS, BATCH).rank_positions(0, WORKERS - 1))

    seconds, memory = measured(first_batch)
    return [("made, with a first batch", f"{seconds:.2f} s, {memory:.0f} MB")]


def main(shards: int = 10_000, samples: int = 10_000_000, report: bool = False) -> None:
    """Measure.

    Args:
        shards: Shards, of unequal size.
        samples: Samples in all of them.
        report: Write a report as well.
    """
    counts = unequal(shards, samples)
    sizes = image_sizes(counts)
    shapes = bucket_shapes(1024, 64)

    def bucketed() -> BucketPlan:
        return BucketPlan(Plan(counts), *choose_buckets(sizes, shapes, BATCH), BATCH)

    head = f"{RANKS:,} ranks x {WORKERS} workers, batches of {BATCH}, {shards:,} shards of "
    lines = [head + f"{counts.min():,} to {counts.max():,} samples, {samples:,} samples."]
    plan, buckets = Plan(counts), bucketed()
    parts: dict[str, list[Callable[[], Rows]]] = {
        "index": [lambda: of_index(counts, sizes)],
        "plan": [
            lambda: made(lambda: Plan(counts)),
            lambda: everyone(plan, counts),
            lambda: same_order(plan, counts, samples // 2),
            lambda: other_ranks(plan, counts),
        ],
        "plan with aspect buckets": [
            lambda: made(bucketed),
            lambda: everyone(buckets, counts),
            lambda: same_order(buckets, counts, samples // 10),
            lambda: other_ranks(buckets, counts),
        ],
    }
    for title, measures in parts.items():
        lines += ["", f"| {title} | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for measure in measures for name, value in measure()]
    print("\n".join(lines))
    if report:
        print(write_report("plan_scale", "\n".join(lines)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

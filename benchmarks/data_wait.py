"""Share of a step that waits for data, at a given number of pairs in a second.

    python -m benchmarks.data_wait --report true
    python -m benchmarks.data_wait --pairs 24 --steps 4

A step takes what it would on a GPU of that speed: after each batch the process sleeps for the time
of its pairs, so that the workers have the CPU to themselves. The first batch, whose wait is the
start of the workers, is not counted. Measured are JPEGs of 1024 x 1024 pixels at 8 pairs/s (SDXL,
faster than one H100 trains it) and a cache of latents and prompts at 100 pairs/s.
"""

from __future__ import annotations

import tempfile
import time
from itertools import chain, islice, repeat
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.common import random_shards, write_report
from benchmarks.loader import cache
from lit_prefopt.datamodules import CachedPairs, PairShards
from lit_prefopt.datamodules.base import StoredPairs


def waits(data: StoredPairs, rate: float, steps: int) -> tuple[float, float]:
    """Return the seconds that steps waited for their batches, and all seconds.

    Args:
        data: The data module.
        rate: Pairs of a step in a second.
        steps: Counted steps.
    """
    data.setup("fit")
    loader, waited = data.train_dataloader(), 0.0
    batches = chain.from_iterable(repeat(loader))  # workers stay from epoch to epoch
    time.sleep(len(next(batches).keys) / rate)
    start = before = time.perf_counter()
    for batch in islice(batches, steps):
        waited += time.perf_counter() - before
        time.sleep(len(batch.keys) / rate)
        before = time.perf_counter()
    return waited, time.perf_counter() - start


def main(
    pairs: int = 200,
    steps: int = 40,
    batch: int = 4,
    workers: int = 2,
    image_rate: float = 8.0,
    cache_rate: float = 100.0,
    folder: str | None = None,
    report: bool = False,
) -> None:
    """Measure.

    Args:
        pairs: Pairs in the shards; an epoch should hold more than the steps need.
        steps: Counted steps.
        batch: Pairs in a step.
        workers: Processes that read and decode.
        image_rate: Pairs in a second that are trained on from images.
        cache_rate: Pairs in a second that are trained on from a cache.
        folder: Folder of the shards; a temporary one by default.
        report: Also write a report.
    """
    root = Path(folder or tempfile.mkdtemp())
    large = random_shards(root / "jpegs-1024", pairs, 1024)
    small = random_shards(root / "jpegs-512", pairs, 512)
    cached = cache(root, small, 512)
    kinds = {
        "JPEGs of 1024 x 1024": (
            PairShards(str(large), batch, resolution=1024, workers=workers),
            image_rate,
        ),
        "cached latents and prompts of 512 x 512": (
            CachedPairs(str(cached), batch, workers=workers),
            cache_rate,
        ),
    }
    lines = [
        f"{steps} steps of {batch} pairs, {workers} workers.",
        "",
        "| | pairs/s of the step | s waited | s | share |",
        "|---|---|---|---|---|",
    ]
    for name, (data, rate) in kinds.items():
        waited, whole = waits(data, rate, steps)
        lines.append(f"| {name} | {rate:g} | {waited:.3f} | {whole:.2f} | {waited / whole:.2%} |")
    text = "\n".join(lines)
    print(text)
    if report:
        print(write_report("data_wait", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

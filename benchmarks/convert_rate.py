"""Speed and memory of the conversion to shards, compared with reading and hashing alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from lit_prefopt.prepare import convert, validate
from lit_prefopt.prepare.image_checks import digest

SIDE = 512  # pixels
BASES = 200  # pictures of which all others are made
Run = dict[str, float]


def make_pairs(folder: Path, pairs: int) -> Path:
    """Write pairs of JPEGs and the .jsonl that names them: shifted and dimmed smooth pictures."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (BASES, 24, 24, 3), dtype=np.uint8)
    grain = random.normal(0, 8, (SIDE, SIDE, 1)).astype(np.int16)
    lines = []
    for pair in range(pairs):
        names = []
        for side in ("chosen", "rejected"):
            small = Image.fromarray(coarse[random.integers(BASES)])
            base = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            pixels = np.roll(base + grain, int(random.integers(SIDE)), axis=1).clip(0, 255)
            buffer = BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
            names.append(f"{pair:06d}-{side}.jpg")
            (folder / names[-1]).write_bytes(buffer.getvalue())
        lines.append({"prompt": f"picture {pair}", "chosen": names[0], "rejected": names[1]})
    source = folder / "pairs.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    return source


def measure(task: str, source: str, output: str = "", workers: int = 1) -> None:
    """Do one thing in this process and print its time and peak memory as JSON.

    Args:
        task: nothing, read, convert or validate.
        source: The .jsonl, or the shards.
        output: Output folder of shards.
        workers: Threads.
    """
    start, before = time.perf_counter(), time.process_time()
    if task == "read":
        for line in Path(source).read_text().splitlines():
            record = json.loads(line)
            for side in ("chosen", "rejected"):
                digest((Path(source).parent / record[side]).read_bytes())
    elif task == "convert":
        convert(source, output, workers=workers)
    elif task == "validate":
        validate(source, workers=workers)
    run = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - before}
    # of this program alone; getrusage would count what the parent held when it started this one
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({**run, "mib": int(peak) / 1024}))


def measured(task: str, source: Path, **options: object) -> Run:
    """Return what `measure` prints in a process of its own."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.convert_rate", "measure", "--task", task]
    done = subprocess.run(
        [*command, "--source", str(source), *arguments], check=True, capture_output=True, text=True
    )
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def main(pairs: int = 5000, few: int = 1000, workers: int = 2, report: bool = False) -> None:
    """Make pairs of 512 x 512 JPEGs, convert and validate them, and print rates and memory.

    Args:
        pairs: How many pairs there are.
        few: How many of them the second measurement of memory takes.
        workers: Threads of the parallel runs.
        report: Write a dated report.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, short = make_pairs(folder, pairs), folder / "few.jsonl"
        kilobytes = sum(f.stat().st_size for f in folder.glob("*.jpg")) / (2000 * pairs)
        short.write_text("\n".join(source.read_text().splitlines()[:few]))
        outputs = {1: folder / "one", workers: folder / "several"}
        runs = {"floor: read and hash, 1 thread": measured("read", source)}
        for threads, output in outputs.items():
            run = measured("convert", source, output=output, workers=threads)
            runs[f"convert, {threads} threads"] = run
        runs[f"validate, {workers} threads"] = measured(
            "validate", outputs[workers], workers=workers
        )
        memory = {
            "nothing, all modules imported": measured("nothing", source),
            f"convert {few} pairs": measured("convert", short, output=folder / "few"),
            f"convert {pairs} pairs": runs["convert, 1 threads"],
            f"convert {pairs} pairs, {workers} threads": runs[f"convert, {workers} threads"],
        }
    text = _table(pairs, kilobytes, runs, memory)
    print(text)
    if report:
        from benchmarks.common import write_report  # heavy, and the measured processes need it not

        print(write_report("convert_rate", text))


def _table(pairs: int, kilobytes: float, runs: dict[str, Run], memory: dict[str, Run]) -> str:
    rates = [
        f"| {name} | {run['seconds']:.1f} | {run['cpu']:.1f} | {2 * pairs / run['seconds']:.0f} | "
        f"{2 * pairs / run['cpu']:.0f} |"
        for name, run in runs.items()
    ]
    peaks = [f"| {name} | {run['mib']:.0f} |" for name, run in memory.items()]
    return "\n".join(
        [
            f"{pairs} pairs of {SIDE} x {SIDE} JPEGs, {kilobytes:.0f} kB each on the average, just "
            "written and so in the memory of the file system.",
            "",
            "| run | seconds | seconds of processor | images/s | images/s per core |",
            *("|---|---|---|---|---|", *rates, ""),
            "| peak memory of the process | MiB |",
            *("|---|---|", *peaks),
        ]
    )


if __name__ == "__main__":
    auto_cli({"main": main, "measure": measure}, as_positional=False)

"""Makes the runs that are missing, and a row of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from experiments.common import write_report
from experiments.compare_methods.figure import draw
from experiments.compare_methods.plan import Comparison, Row, prepared
from experiments.compare_methods.table import best_settings, table, total
from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import write_atomic

MAKING: defaultdict[str, Lock] = defaultdict(Lock)
"""What is being made, so that two runs that need it make it once."""


def lit_prefopt(arguments: Iterable[str], log: Path, threads: int) -> None:
    """Run a command in a process of its own, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        subprocess.run(
            [sys.executable, "-m", "lit_prefopt.cli", *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
        )


def prepare(what: Comparison, name: str, seed: int, threads: int) -> None:
    """Make what a run needs and is not there; what another command has made is refused.

    Beside an output, FILE.json says by which command it was made, and whether that has ended. What
    is there without it was made by hand, and is taken as it is.

    Raises:
        InputError: An output was made by another command than `prepared.yaml`'s.
    """
    for output in what.needed(name):
        made = prepared()[output]
        path, *arguments = what.filled([output, *made.command], seed)
        note = Path(f"{path}.json")
        with MAKING[path]:
            if Path(path).exists():
                by = json.loads(note.read_text()) if note.exists() else None
                if by and by["command"] != arguments:
                    raise InputError(
                        f"{path} was made by another command than prepared.yaml's: move it away."
                    )
                if by is None or by["ended"]:
                    continue
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, json.dumps({"command": arguments, "ended": False}))
            more = going_on(Path(made.run)) if made.run else []
            lit_prefopt([*arguments, *more], Path(f"{path}.log"), threads)
            write_atomic(note, json.dumps({"command": arguments, "ended": True}))


def command(what: Comparison, name: str, seed: int) -> list[str]:
    """Return the arguments of `lit-prefopt` that make a run."""
    root = what.folder(name, seed)
    limits = what.limits(name).items()
    arguments = [
        *("fit", *what.filled(what.method(name).arguments, seed), *what.common),
        *("--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--trainer.default_root_dir", str(root)),
        *("--trainer.callbacks+", "Budget"),
        *(f"--trainer.callbacks.{key}={limit}" for key, limit in limits),
    ]
    if what.curve and (what.curve_seeds is None or seed in what.curve_seeds):
        arguments += ["--trainer.callbacks+=RewardCurve", f"--trainer.callbacks.at={what.curve}"]
    return arguments + going_on(root)


def going_on(root: Path) -> list[str]:
    """Return what lets a run that was stopped go on from its last checkpoint."""
    begun = (root / "checkpoints" / "last.ckpt").exists()
    return ["--ckpt_path", "last"] if begun else []


def claim(what: Comparison, name: str, seed: int) -> None:
    """Refuse to take a run with other arguments for this one, and note these.

    Raises:
        InputError: The run's folder holds another one.
    """
    root = what.folder(name, seed)
    note = root.parent / f"{root.name}.json"
    arguments = [*what.method(name).arguments, *what.common]
    settings = json.dumps({"arguments": arguments, "limits": what.limits(name)}, indent=2)
    if root.exists() and not (note.exists() and note.read_text() == settings):
        raise InputError(
            f"{root} was made with other arguments than the plan's: move it away, or give the "
            "method another name."
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(settings)


def run(what: Comparison, name: str, seed: int, threads: int) -> Row:
    """Return the row of one run, made or finished now."""
    method, root = what.method(name), what.folder(name, seed)
    claim(what, name, seed)
    prepare(what, name, seed, threads)
    results = root / "evaluation" / "evaluation.json"
    begun = time.monotonic()
    if not results.exists():
        lit_prefopt(command(what, name, seed), root.parent / f"{root.name}.log", threads)
    found = json.loads(results.read_text())
    prompts = _lines(results.parent / "per_prompt.jsonl")
    curve = root / "curve.jsonl"
    points = _lines(curve) if curve.exists() else []
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    [spent] = [s for callback, s in state["callbacks"].items() if callback.startswith("Budget")]
    return {
        "method": name,
        "seed": seed,
        "arguments": method.arguments,
        "limits": what.limits(name),
        "evaluations": spent["spent"],
        "pairs": spent["pairs"],
        "judge_calls": spent["judge_calls"],
        "steps": state["global_step"],
        "seconds": round(time.monotonic() - begun, 1),
        "seconds_training": round(found["seconds_fit"] - sum(_seconds(points)), 1),
        "threads": threads,
        "date": str(date.today()),
        "commit": _git("describe", "--always", "--dirty"),
        "attributes": {n: round(a["difference"], 4) for n, a in found["attributes"].items()},
        "attributes_before": {n: round(a["reference"], 4) for n, a in found["attributes"].items()},
        "before": [round(p["reward_reference"], 4) for p in prompts],
        "after": [round(p["reward_policy"], 4) for p in prompts],
        "curve": [_point(point) for point in points],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _seconds(points: list[dict[str, Any]]) -> list[float]:
    """Return what each measurement took; one that stands for several points counts once."""
    return [*{point["step"]: point["seconds"] for point in points}.values()]


def _point(point: dict[str, Any]) -> dict[str, Any]:
    rewards = [round(reward, 4) for reward in point["rewards"]]
    return {key: value for key, value in point.items() if key != "seconds"} | {"rewards": rewards}


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def make(what: Comparison, jobs: int) -> None:
    """Make the runs that are missing, and write each one's row as soon as it ends."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for name, _ in what.missing():
        what.needed(name)  # all of it can be made
    begun: set[tuple[str, int]] = set()
    running: set[Future[Row]] = set()
    failed: list[BaseException] = []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            ready = [one for one in what.ready() if one not in begun]
            begun.update(ready)
            running |= {pool.submit(run, what, name, seed, threads) for name, seed in ready}
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one in ended:
                if (error := one.exception()) is not None:
                    failed.append(error)
                else:
                    write_row(what, one.result())
    if failed:  # the others' rows are written
        raise failed[0]


def write_row(what: Comparison, row: Row) -> None:
    """Add a finished run to the committed rows, and tell it."""
    with what.rows.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    gained = np.mean(row["after"]) - np.mean(row["before"])
    print(
        f"{row['method']}, seed {row['seed']}: {gained:+.4f} in {row['seconds']:.0f} s", flush=True
    )


def main(comparison: Comparison, jobs: int = 1, report: bool = False, dry: bool = False) -> None:
    """Make all runs that are missing, then print the table and draw the figure.

    Args:
        comparison: What is compared; `--config FILE` reads it.
        jobs: Runs at a time; the cores are shared out among them.
        report: Write a report as well.
        dry: Make no run, and tell which ones are missing.
    """
    if dry:
        missing = comparison.missing()
        print(f"{len(comparison.runs()) - len(missing)} runs are finished, {len(missing)} missing:")
        print("\n".join(f"  {name}, seed {seed}" for name, seed in missing))
    else:
        make(comparison, jobs)
    rows = comparison.finished()
    text = f"{table(comparison, rows)}\n\n{total(rows)}"
    if settings := best_settings(comparison, rows):
        text += f"\n\n{settings}"
    print(text)
    if figure := draw(comparison, rows):
        print(figure)
        text += f"\n\n![true reward against denoiser evaluations]({figure.name})"
    if report:
        limits = {name: comparison.limits(name) for name in comparison.methods}
        listed = "\n".join(
            f"- {' or '.join(f'{n:,} {key}' for key, n in some.items())}: "
            f"{', '.join(name for name in limits if limits[name] == some)}"
            for some in _distinct([*limits.values()])
        )
        head = f"{comparison.title}\n\nA run ends after\n\n{listed}\n\n"
        print(write_report("compare_methods", head + text, comparison.name))


def _distinct(items: list[dict[str, int]]) -> list[dict[str, int]]:
    return [one for i, one in enumerate(items) if one not in items[:i]]

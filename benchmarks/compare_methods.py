"""Methods on equal terms: same base, same budget of denoiser evaluations, same held-out prompts.

    python -m benchmarks.compare_methods --config benchmarks/compare/toy-on-policy.yaml --jobs 2

A run that is finished is a line of `benchmarks/reports/NAME.jsonl`, written as soon as it ends, and
is not made again; one that was stopped goes on from its last checkpoint. So the whole may take
several sittings, and the lines are the record that the tables are made of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli

from benchmarks.common import REPORTS, write_report
from lit_prefopt.evaluate.statistics import two_way_interval


@dataclass
class Prepared:
    """What must be there before a run: made by a command of this library if it is not.

    Args:
        output: File or folder that the command makes.
        command: Its arguments.
        module: What is run: `lit-prefopt`, or another module of it.
    """

    output: str
    command: list[str]
    module: str = "lit_prefopt.cli"


@dataclass
class Method:
    """One row of the table; {seed} stands for the seed of a run, {runs} for the folder of runs.

    Args:
        arguments: Further arguments of `lit-prefopt fit`.
        evaluations: Budget of a run where it is not the comparison's.
        after: Another method whose runs of the same seed must be there before: the round before.
        needs: What must be there before a run of this method.
        against: The method whose reference its reward is compared with, on the same prompts and
            seeds; its own where not given.
    """

    arguments: list[str]
    evaluations: int | None = None
    after: str | None = None
    needs: list[Prepared] = field(default_factory=list)
    against: str | None = None


@dataclass
class Comparison:
    """What is compared.

    Args:
        name: Of the rows' file and of the folder of the runs.
        title: One sentence for the report.
        evaluations: Budget of each run, in denoiser evaluations (see the callback `Budget`).
        common: Arguments of every `lit-prefopt fit`.
        methods: What each one adds to them, by its name in the table.
        seeds: Seeds of the runs.
        prepare: What must be there before all runs.
    """

    name: str
    title: str
    evaluations: int
    common: list[str]
    methods: dict[str, Method | list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    prepare: list[Prepared] = field(default_factory=list)

    def method(self, name: str) -> Method:
        """Return a method by its name; arguments alone are one."""
        found = self.methods[name]
        return found if isinstance(found, Method) else Method(found)

    def budget(self, name: str) -> int:
        """Return the budget of a method's runs."""
        return self.method(name).evaluations or self.evaluations

    def folder(self, name: str, seed: int) -> Path:
        """Return where a run lies."""
        return Path("runs") / self.name / f"{name.replace(' ', '-')}-seed{seed}"

    def filled(self, arguments: list[str], seed: int) -> list[str]:
        """Return arguments with what their marks stand for."""
        marks = {"{seed}": str(seed), "{runs}": f"runs/{self.name}"}
        for mark, value in marks.items():
            arguments = [one.replace(mark, value) for one in arguments]
        return arguments

    @property
    def rows(self) -> Path:
        """Where the finished runs stand."""
        return REPORTS / f"{self.name}.jsonl"

    def finished(self) -> list[dict[str, Any]]:
        """Return the rows of the runs that are finished and belong here."""
        if not self.rows.is_file():
            return []
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        return [row for row in rows if self._belongs(row)]

    def _belongs(self, row: dict[str, Any]) -> bool:
        name = row["method"]
        if name not in self.methods or row["seed"] not in self.seeds:
            return False
        same = row["arguments"] == self.method(name).arguments
        return same and row["budget"] == self.budget(name)


def lit_prefopt(
    arguments: Iterable[str], log: Path, threads: int, module: str = "lit_prefopt.cli"
) -> None:
    """Run a command in a process of its own, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
        )


def prepare(made: Prepared, what: Comparison, seed: int, threads: int) -> None:
    """Make what must be there, if it is not."""
    [output] = what.filled([made.output], seed)
    if not Path(output).exists():
        log = Path("runs") / what.name / f"{output.replace('/', '-')}.log"
        lit_prefopt(what.filled(made.command, seed), log, threads, made.module)


def run(what: Comparison, name: str, seed: int, threads: int) -> dict[str, Any]:
    """Return the row of one run, made or finished now."""
    method, root = what.method(name), what.folder(name, seed)
    for made in method.needs:
        prepare(made, what, seed, threads)
    evidence = root / "evaluation" / "evaluation.json"
    last = root / "checkpoints" / "last.ckpt"
    arguments = [
        *("fit", *what.filled(method.arguments, seed), *what.common),
        *("--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--trainer.default_root_dir", str(root)),
        *("--trainer.callbacks+", "Budget"),
        *("--trainer.callbacks.evaluations", str(what.budget(name))),
        *(("--ckpt_path", "last") if last.exists() else ()),
    ]
    begun = time.monotonic()
    if not evidence.exists():
        lit_prefopt(arguments, root.parent / f"{root.name}.log", threads)
    found = json.loads(evidence.read_text())
    prompts = [json.loads(x) for x in (evidence.parent / "per_prompt.jsonl").open()]
    state = torch.load(last, weights_only=True)
    [budget] = [s for callback, s in state["callbacks"].items() if callback.startswith("Budget")]
    return {
        "method": name,
        "seed": seed,
        "arguments": method.arguments,
        "budget": what.budget(name),
        "evaluations": budget["spent"],
        "steps": state["global_step"],
        "seconds": round(time.monotonic() - begun, 1),
        "date": str(date.today()),
        "commit": _git("describe", "--always", "--dirty"),
        "attributes": {n: round(a["difference"], 4) for n, a in found["attributes"].items()},
        "attributes_before": {n: round(a["reference"], 4) for n, a in found["attributes"].items()},
        "before": [round(p["reward_reference"], 4) for p in prompts],
        "after": [round(p["reward_policy"], 4) for p in prompts],
    }


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def table(what: Comparison, rows: list[dict[str, Any]]) -> str:
    """Return the finished runs in numbers, with 95 % intervals over seeds and prompts."""
    names = list(rows[0]["attributes"]) if rows else []
    lines = [
        "| method | seeds | start | mean true reward | difference | win rate | worse by > 0.01 "
        f"| steps | evaluations | {' | '.join(names)} |",
        "|---" * (9 + len(names)) + "|",
    ]
    start = {(row["method"], row["seed"]): row for row in rows}
    for method in what.methods:
        against = what.method(method).against or method
        own = [r for r in rows if r["method"] == method and (against, r["seed"]) in start]
        own.sort(key=lambda r: r["seed"])
        if not own:
            continue
        after = np.array([row["after"] for row in own])
        before = np.array([start[against, row["seed"]]["before"] for row in own])
        gained = after - before
        wins = (np.sign(gained) + 1) / 2
        low, high = two_way_interval(gained)
        least, most = two_way_interval(wins)
        own_starts = [start[against, row["seed"]] for row in own]
        attributes = [
            np.mean([_attribute(row, base, n) for row, base in zip(own, own_starts, strict=True)])
            for n in names
        ]
        cells = [
            method,
            str(len(own)),
            f"{before.mean():.3f}",
            f"{after.mean():.3f} ({', '.join(f'{x:.3f}' for x in after.mean(1))})",
            f"{gained.mean():+.4f} ({low:+.4f} to {high:+.4f})",
            f"{wins.mean():.3f} ({least:.3f} to {most:.3f})",
            f"{(gained < -0.01).mean():.0%}",
            f"{np.mean([row['steps'] for row in own]):.0f}",
            f"{np.mean([row['evaluations'] for row in own]):,.0f}",
            *(f"{x:+.3f}" for x in attributes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _attribute(row: dict[str, Any], start: dict[str, Any], name: str) -> float:
    """Return how far an attribute has risen since the start of another run, or of this one."""
    risen = row["attributes"][name]
    if start is row:
        return risen
    return risen + row["attributes_before"][name] - start["attributes_before"][name]


def main(comparison: Comparison, jobs: int = 1, report: bool = False) -> None:
    """Make all runs that are missing, then print the table.

    Args:
        comparison: What is compared; `--config FILE` reads it.
        jobs: Runs at a time; the cores are shared out among them.
        report: Write a report as well.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for made in comparison.prepare:
        prepare(made, comparison, 0, os.cpu_count() or 1)
    while ready := _ready(comparison):
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(run, comparison, m, s, threads) for m, s in ready]
            for (method, seed), one in zip(ready, waiting, strict=True):
                row = one.result()
                with comparison.rows.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                gained = np.mean(row["after"]) - np.mean(row["before"])
                print(f"{method}, seed {seed}: {gained:+.4f} in {row['seconds']:.0f} s", flush=True)
    text = table(comparison, comparison.finished())
    print(text)
    if report:
        head = f"{comparison.title}\n\n{comparison.evaluations:,} denoiser evaluations a run.\n\n"
        print(write_report("compare_methods", head + text, comparison.name))


def _ready(what: Comparison) -> list[tuple[str, int]]:
    """Return the runs that are missing and can be made now."""
    done = {(row["method"], row["seed"]) for row in what.finished()}
    every = [(name, seed) for seed in what.seeds for name in what.methods]
    return [
        (name, seed)
        for name, seed in every
        if (name, seed) not in done
        and (what.method(name).after is None or (what.method(name).after, seed) in done)
    ]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

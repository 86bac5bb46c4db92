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
    """What must be there before any run: made by a command of this library if it is not.

    Args:
        output: File or folder that the command makes.
        command: Arguments of `lit-prefopt`.
    """

    output: str
    command: list[str]


@dataclass
class Comparison:
    """What is compared.

    Args:
        name: Of the rows' file and of the folder of the runs.
        title: One sentence for the report.
        evaluations: Budget of each run, in denoiser evaluations (see the callback `Budget`).
        common: Arguments of every `lit-prefopt fit`.
        methods: Its further arguments, by the name in the table.
        seeds: Seeds of the runs.
        prepare: What must be there before.
    """

    name: str
    title: str
    evaluations: int
    common: list[str]
    methods: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    prepare: list[Prepared] = field(default_factory=list)

    @property
    def rows(self) -> Path:
        """Where the finished runs stand."""
        return REPORTS / f"{self.name}.jsonl"

    def finished(self) -> list[dict[str, Any]]:
        """Return the rows of the runs that are finished and belong here."""
        if not self.rows.is_file():
            return []
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        here = [r for r in rows if r["arguments"] == self.methods.get(r["method"])]
        return [r for r in here if r["seed"] in self.seeds and r["budget"] == self.evaluations]


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


def run(what: Comparison, method: str, seed: int, threads: int) -> dict[str, Any]:
    """Return the row of one run, made or finished now."""
    root = Path("runs") / what.name / f"{method.replace(' ', '-')}-seed{seed}"
    evidence = root / "evaluation" / "evaluation.json"
    last = root / "checkpoints" / "last.ckpt"
    arguments = [
        *("fit", *what.methods[method], *what.common),
        *("--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--trainer.default_root_dir", str(root)),
        *("--trainer.callbacks+", "Budget"),
        *("--trainer.callbacks.evaluations", str(what.evaluations)),
        *(("--ckpt_path", "last") if last.exists() else ()),
    ]
    begun = time.monotonic()
    if not evidence.exists():
        lit_prefopt(arguments, root.parent / f"{root.name}.log", threads)
    found = json.loads(evidence.read_text())
    prompts = [json.loads(x) for x in (evidence.parent / "per_prompt.jsonl").open()]
    state = torch.load(last, weights_only=True)
    [budget] = [s for name, s in state["callbacks"].items() if name.startswith("Budget")]
    return {
        "method": method,
        "seed": seed,
        "arguments": what.methods[method],
        "budget": what.evaluations,
        "evaluations": budget["spent"],
        "steps": state["global_step"],
        "seconds": round(time.monotonic() - begun, 1),
        "date": str(date.today()),
        "commit": _git("describe", "--always", "--dirty"),
        "attributes": {n: round(a["difference"], 4) for n, a in found["attributes"].items()},
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
        "| method | seeds | mean true reward | difference | win rate | worse by > 0.01 | steps "
        f"| evaluations | {' | '.join(names)} |",
        "|---" * (8 + len(names)) + "|",
    ]
    base = [np.mean(row["before"]) for row in rows]
    if base:
        lines.append(f"| base | | {np.mean(base):.3f} {'| ' * (6 + len(names))}|")
    for method in what.methods:
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
        if not own:
            continue
        after = np.array([row["after"] for row in own])
        gained = after - np.array([row["before"] for row in own])
        wins = (np.sign(gained) + 1) / 2
        low, high = two_way_interval(gained)
        least, most = two_way_interval(wins)
        attributes = [np.mean([row["attributes"][n] for row in own]) for n in names]
        cells = [
            method,
            str(len(own)),
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


def main(comparison: Comparison, jobs: int = 1, report: bool = False) -> None:
    """Make all runs that are missing, then print the table.

    Args:
        comparison: What is compared; `--config FILE` reads it.
        jobs: Runs at a time; the cores are shared out among them.
        report: Write a report as well.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for made in comparison.prepare:
        if not Path(made.output).exists():
            log = Path("runs") / comparison.name / f"{Path(made.output).name}.log"
            lit_prefopt(made.command, log, os.cpu_count() or 1)
    done = {(row["method"], row["seed"]) for row in comparison.finished()}
    missing = [(m, s) for s in comparison.seeds for m in comparison.methods if (m, s) not in done]
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, comparison, m, s, threads) for m, s in missing]
        for (method, seed), one in zip(missing, waiting, strict=True):
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


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

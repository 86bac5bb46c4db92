"""What is compared, and which of its runs are finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lit_prefopt.errors import InputError

Row = dict[str, Any]
PLANS = Path(__file__).parents[1] / "compare"
PREPARED = Path(__file__).parents[1] / "prepared.yaml"
REPORTS = Path(__file__).parents[1] / "reports"


@dataclass
class Prepared:
    """How a file or folder is made that runs learn from; marks are filled in as in a method.

    Args:
        command: Arguments of `lit-prefopt`.
        needs: What the command needs and does not name: its recipe does.
        run: Directory of the run that the command is, where it is a training; one that was stopped
            goes on.
    """

    command: list[str]
    needs: list[str] = field(default_factory=list)
    run: str | None = None


@dataclass
class Data:
    """What making a method's data has cost, before any run.

    Args:
        judge_calls: Images that a judge was asked about.
        evaluations: Rows of the denoiser that were asked to make the images.
    """

    judge_calls: int = 0
    evaluations: int = 0


@dataclass
class Method:
    """One row of the table; {seed} stands for the seed of a run, {runs} for the folder of runs.

    Args:
        arguments: Further arguments of `lit-prefopt fit`.
        evaluations: What ends a run in place of the comparison's limits.
        after: Another method whose runs of the same seed must be there before: the round before.
        needs: What its recipe needs and its arguments do not name; see `Comparison.needed`.
        against: The method whose reference its reward is compared with, on the same prompts and
            seeds; its own where not given.
        data: What its data have cost.
        seeds: Seeds of its runs where they are not the comparison's.
        setting_of: The method that this is one setting of; the report names the best of each.
    """

    arguments: list[str]
    evaluations: int | None = None
    after: str | None = None
    needs: list[str] = field(default_factory=list)
    against: str | None = None
    data: Data = field(default_factory=Data)
    seeds: list[int] | None = None
    setting_of: str | None = None


@dataclass
class Comparison:
    """What is compared.

    Args:
        name: Of the rows' file and of the folder of the runs.
        title: One sentence for the report.
        common: Arguments of every `lit-prefopt fit`.
        methods: What each one adds to them, by its name in the table.
        evaluations: Limit of each run, in denoiser evaluations (see the callback `Budget`).
        pairs: Limit of each run, in pairs that it learns from.
        judge_calls: Limit of each run, in images that its judge is asked about.
        seeds: Seeds of the runs.
        also: Other comparisons, by name, whose finished runs count where arguments, limits and
            seed are the same; their common arguments must be.
        curve: Denoiser evaluations after which the policy is judged in mid-run, for the figure.
        curve_seeds: Seeds of the runs that are judged so; all where they are not given.
    """

    name: str
    title: str
    common: list[str]
    methods: dict[str, Method | list[str]]
    evaluations: int | None = None
    pairs: int | None = None
    judge_calls: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    also: list[str] = field(default_factory=list)
    curve: list[int] = field(default_factory=list)
    curve_seeds: list[int] | None = None

    def method(self, name: str) -> Method:
        """Return a method by its name; arguments alone are one."""
        found = self.methods[name]
        return found if isinstance(found, Method) else Method(found)

    def limits(self, name: str) -> dict[str, int]:
        """Return what ends a method's runs, by the arguments of `Budget`."""
        if (own := self.method(name).evaluations) is not None:
            return {"evaluations": own}
        named = {
            "evaluations": self.evaluations,
            "pairs": self.pairs,
            "judge_calls": self.judge_calls,
        }
        given = {key: limit for key, limit in named.items() if limit is not None}
        if not given:
            raise InputError(
                f"nothing ends a run of {name}: give evaluations, pairs or judge_calls in the plan."
            )
        return given

    def folder(self, name: str, seed: int) -> Path:
        """Return where a run lies."""
        return Path("runs") / self.name / f"{name.replace(' ', '-')}-seed{seed}"

    def filled(self, arguments: list[str], seed: int) -> list[str]:
        """Return arguments with what their marks stand for."""
        marks = {"{seed}": str(seed), "{runs}": f"runs/{self.name}"}
        for mark, value in marks.items():
            arguments = [one.replace(mark, value) for one in arguments]
        return arguments

    def needed(self, name: str) -> list[str]:
        """Return what a method's runs need of `prepared.yaml`, what it needs itself before it.

        That is what it says to need, and every output that an argument names, or a file in it.
        """
        method = self.method(name)
        return [*dict.fromkeys(_in_order([*method.needs, *_named(method.arguments)]))]

    def runs(self) -> list[tuple[str, int]]:
        """Return all runs, seed by seed: what is whole early can be looked at early."""
        seeds = {name: self.method(name).seeds or self.seeds for name in self.methods}
        every = sorted({seed for some in seeds.values() for seed in some})
        return [(name, seed) for seed in every for name in self.methods if seed in seeds[name]]

    @property
    def rows(self) -> Path:
        """Where the finished runs stand."""
        return REPORTS / f"{self.name}.jsonl"

    def finished(self) -> list[Row]:
        """Return the rows of the finished runs that belong here, under their names here."""
        rows = read(self.rows)
        for other in self.also:
            self._check_same_terms(other)
            rows += read(REPORTS / f"{other}.jsonl")
        found: dict[tuple[str, int], Row] = {}
        for name, seed in self.runs():
            same = [row for row in rows if self._is(row, name, seed)]
            if same:  # own rows come first
                found[name, seed] = same[0] | {"method": name}
        return [*found.values()]

    def _is(self, row: Row, name: str, seed: int) -> bool:
        same = row["arguments"] == self.method(name).arguments and row["seed"] == seed
        return same and limits_of(row) == self.limits(name)

    def _check_same_terms(self, other: str) -> None:
        plan = yaml.safe_load((PLANS / f"{other}.yaml").read_text())["comparison"]
        if sorted(plan["common"]) != sorted(self.common):
            raise InputError(
                f"{other} has other common arguments than {self.name}: its runs were judged on "
                "other terms; leave it out of `also`."
            )

    def missing(self) -> list[tuple[str, int]]:
        """Return the runs that are not finished, in the order in which they are made."""
        done = {(row["method"], row["seed"]) for row in self.finished()}
        return [one for one in self.runs() if one not in done]

    def ready(self) -> list[tuple[str, int]]:
        """Return the runs that are missing and can be made now."""
        done = {(row["method"], row["seed"]) for row in self.finished()}
        return [
            (name, seed)
            for name, seed in self.missing()
            if self.method(name).after is None or (self.method(name).after, seed) in done
        ]


@cache
def prepared() -> dict[str, Prepared]:
    """Return how each output is made that runs of comparisons learn from."""
    parser = ArgumentParser()
    parser.add_argument("--outputs", type=dict[str, Prepared])
    found: dict[str, Prepared] = parser.instantiate(parser.parse_path(PREPARED)).outputs
    return found


def _named(arguments: list[str]) -> list[str]:
    """Return the outputs that are the value of an argument, or hold the file that is."""
    values = [Path(one.partition("=")[2]) for one in arguments]
    return [
        output
        for output in prepared()
        if any(Path(output) in (value, *value.parents) for value in values)
    ]


def _in_order(outputs: list[str]) -> Iterator[str]:
    """Yield outputs, each after those that its command needs."""
    for output in outputs:
        if output not in prepared():
            raise InputError(f"{PREPARED.name} does not say how {output} is made: add it there.")
        made = prepared()[output]
        # its command names what it makes, too
        others = [one for one in [*made.needs, *_named(made.command)] if one != output]
        yield from _in_order(others)
        yield output


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def limits_of(row: Row) -> dict[str, int]:
    """Return what ended a run; rows from before other limits were known have a budget."""
    return row["limits"] if "limits" in row else {"evaluations": row["budget"]}


def load(path: Path) -> Comparison:
    """Return the comparison of a plan's file."""
    parser = ArgumentParser()
    parser.add_argument("--comparison", type=Comparison)
    found: Comparison = parser.instantiate(parser.parse_path(path)).comparison
    return found

"""One benchmark on two checkouts, turn about, each run in a process of its own.

    python -m benchmarks.against --before ../before --size tiny --rounds 2
    python -m benchmarks.against --before ../before --benchmarks '[step,memory]' --size sd15
    python -m benchmarks.against --before ../before --benchmarks '[start]' --report true

A checkout is a folder with `lit_prefopt`, such as one of `git worktree add ../before 03633d8`. Both
run in the environment of this process. Each makes networks, shards and arguments with its own
`benchmarks` and has its own defaults; a checkout whose `benchmarks` cannot do it borrows those of
the other one, and what even these cannot run is listed as not compared. Benchmarks:

- `step`: seconds of a LoRA step from images, each pair visited for the first time;
- `later_step`: the same where each pair was visited before; not in the toy world;
- `memory`: peak memory of the same step with checkpointing;
- `spo_epoch`: seconds of an epoch of SPO, the second of two;
- `evaluation`: seconds of a run's second evaluation, `test` after `fit` on the same prompts;
- `start`: CPU seconds of a `fit` from the start of the process to its first step, and through it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jsonargparse import auto_cli

from benchmarks.probes.checkout_run import EPOCHS, MARK

Name = Literal["step", "later_step", "memory", "spo_epoch", "evaluation", "start"]
PROBE = Path(__file__).parent / "probes" / "checkout_run.py"
BEFORE, AFTER = "before", "after"
GIB = 2**30


class CannotRunError(Exception):
    """A benchmark that a checkout cannot run."""


class Checkout:
    """A folder with the package, and where its networks and shards are written.

    Args:
        name: `before` or `after`.
        path: The folder.
        folder: Where it writes.
        options: Further arguments of its commands.
    """

    def __init__(self, name: str, path: Path, folder: Path, options: str) -> None:
        if not (path / "lit_prefopt" / "__init__.py").is_file():
            raise SystemExit(f"{path} holds no `lit_prefopt`: name a checkout as --{name}.")
        self.name, self.path, self.options = name, path.resolve(), options.split()
        self.folder = (folder / name).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self.path  # where its modules are imported from
        self.commit = subprocess.run(
            ["git", "-C", str(self.path), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()

    @property
    def described(self) -> str:
        """Its commit, and the options of its commands."""
        options = f" with `{' '.join(self.options)}`" if self.options else ""
        return f"{self.name}: {self.commit or self.path.name}{options}"

    def borrow(self, other: Checkout) -> None:
        """Use the benchmarks of another checkout with the package of this one."""
        self.root = self.folder / "with-borrowed-benchmarks"
        self.root.mkdir(exist_ok=True)
        for name, owner in (
            *((name, self) for name in ("lit_prefopt", "configs")),
            *((name, other) for name in ("benchmarks", "tests")),
        ):
            link = self.root / name
            link.unlink(missing_ok=True)
            link.symlink_to(owner.path / name)

    def call(self, **given: Any) -> Any:
        """Run the probe with this package and return its result."""
        others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        paths = [str(self.root), *(p for p in others if not (Path(p) / "lit_prefopt").is_dir())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [sys.executable, str(PROBE), json.dumps(given)],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
            raise CannotRunError(f"{self.name}: {said[-1][:200]}")
        result = json.loads(lines[-1].removeprefix(MARK))
        if isinstance(result, dict):
            self._check_package(Path(result["package"]))
        return result

    def _check_package(self, file: Path) -> None:
        own = self.path / "lit_prefopt" / "__init__.py"
        if file.resolve() != own.resolve():
            raise RuntimeError(f"{self.name} has run {file} instead of the package in {self.path}.")


def _step(run: dict) -> dict[str, float]:
    steps = run["steps"][1:]
    return {f"a LoRA step, {clock} s": median(s[_key(clock)] for s in steps) for clock in CLOCKS}


def _later_step(run: dict) -> dict[str, float]:
    return {name.replace("a LoRA", "a later LoRA"): value for name, value in _step(run).items()}


def _memory(run: dict) -> dict[str, float]:
    return {"peak of a checkpointed LoRA step, GiB": run["peak"] / GIB}


def _spo_epoch(run: dict) -> dict[str, float]:
    steps = run["steps"]
    last = steps[len(steps) * (EPOCHS - 1) // EPOCHS :]
    return {f"an SPO epoch, {clock} s": sum(s[_key(clock)] for s in last) for clock in CLOCKS}


def _evaluation(run: dict) -> dict[str, float]:
    first, second = run["evaluations"]
    return {
        "the first evaluation, CPU s": first["cpu"],
        "the second evaluation, CPU s": second["cpu"],
        "the second evaluation, wall s": second["wall"],
    }


def _start(run: dict) -> dict[str, float]:
    return {
        "to the first step, CPU s": run["started"],
        "through the first step, CPU s": run["started"] + run["steps"][0]["cpu"],
    }


def _key(clock: str) -> str:
    return clock.lower()


CLOCKS = ("CPU", "wall")
FIGURES: dict[str, Callable[[dict], dict[str, float]]] = {
    "step": _step,
    "later_step": _later_step,
    "memory": _memory,
    "spo_epoch": _spo_epoch,
    "evaluation": _evaluation,
    "start": _start,
}


def main(
    before: str,
    after: str = ".",
    benchmarks: list[Name] | None = None,
    size: Literal["tiny", "toy", "sd15"] = "toy",
    rounds: int = 3,
    steps: int = 3,
    before_options: str = "",
    after_options: str = "",
    folder: str = "runs/against",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        before: Folder of the earlier checkout.
        after: Folder of the later one.
        benchmarks: Which; by default all.
        size: The networks; `tiny` tries the script.
        rounds: How often the two take turns.
        steps: Timed steps of `step` and `memory`, after a first one.
        before_options: More arguments of the earlier one's commands.
        after_options: More arguments of the later one's commands.
        folder: Where networks and shards are written.
        report: Write a report as well.
    """
    pair = [
        Checkout(BEFORE, Path(before), Path(folder), before_options),
        Checkout(AFTER, Path(after), Path(folder), after_options),
    ]
    described = "; ".join(checkout.described for checkout in pair)
    text = f"{size}, {rounds} rounds in turn; {described}"
    lines = [
        text + ".",
        "",
        "| | before | after | before / after | after / before |",
        "|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for name in benchmarks or list(Name.__args__):  # type: ignore[attr-defined]
        try:
            lines += rows(name, pair, size, rounds, steps, notes)
        except CannotRunError as error:
            notes.append(f"`{name}` cannot be compared: {error}")
        print(f"{name}: finished", file=sys.stderr, flush=True)
    text = "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])
    print(text)
    if report:
        from benchmarks.common import write_report  # heavy

        print(write_report("against", text, size))


def rows(
    name: Name, pair: list[Checkout], size: str, rounds: int, steps: int, notes: list[str]
) -> list[str]:
    """Run a benchmark in turn and return the rows of its figures.

    Args:
        name: The benchmark.
        pair: The earlier checkout and the later one.
        size: The networks.
        rounds: How often the two take turns.
        steps: Timed steps.
        notes: Where it is noted that benchmarks were borrowed.
    """
    commands = {c.name: prepare(name, c, pair, size, steps, notes) for c in pair}
    found: dict[str, list[dict[str, float]]] = {c.name: [] for c in pair}
    for number in range(rounds):
        for checkout in pair if number % 2 == 0 else pair[::-1]:
            run = checkout.call(
                do="run", commands=commands[checkout.name], options=checkout.options
            )
            found[checkout.name].append(FIGURES[name](run))
    lines = []
    for figure in found[BEFORE][0]:
        old, new = ([one[figure] for one in found[whose]] for whose in (BEFORE, AFTER))
        faster = [a / b for a, b in zip(old, new, strict=True)]
        shares = [b / a for a, b in zip(old, new, strict=True)]
        cells = " | ".join([spread(old), spread(new), f"**{spread(faster)}**", spread(shares)])
        lines.append(f"| {figure} | {cells} |")
    return lines


def prepare(
    name: Name, checkout: Checkout, pair: list[Checkout], size: str, steps: int, notes: list[str]
) -> list[list[str]]:
    """Return the commands of a benchmark in a checkout.

    Args:
        name: The benchmark.
        checkout: The checkout.
        pair: Both checkouts.
        size: The networks.
        steps: Timed steps.
        notes: Where it is noted that benchmarks were borrowed.
    """
    checkout.root = checkout.path
    given = {"do": "arguments", "kind": name, "family": size, "steps": steps}
    given["folder"] = str(checkout.folder)
    try:
        commands: list[list[str]] = checkout.call(**given)
    except CannotRunError as error:
        [other] = [one for one in pair if one is not checkout]
        checkout.borrow(other)
        commands = checkout.call(**given)
        notes.append(f"`{name}`, benchmarks of the other checkout were used ({error})")
    return commands


def spread(values: list[float]) -> str:
    """Return the median of some values, with the lowest and the highest."""
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""A `fit` against the published procedure of Diffusion-DPO, in the same process, turn about.

    python -m benchmarks.released_step main --family tiny --rounds 3 --steps 2 --visits 2
    python -m benchmarks.released_step main --family toy
    python -m benchmarks.released_step main --family sd15 --pairs 8 --steps 1

The plain script (`plain.py`) has networks of its own, loaded by diffusers from the same folder. For
a full fine-tune it follows the script that was released with the paper: images and texts are
encoded at every step, and the reference is a frozen copy. For a LoRA it follows diffusers' example,
whose reference is the UNet without its adapter. The fit reads images, a cache of latents and
prompts, or such a cache with the reference's errors. Measured are

- `equal`: losses and weights of both under the same draws, from images and from caches;
- `step`: CPU and wall seconds of a step, in rounds that take turns;
- `memory`: the peak of each in a process of its own;
- `whole`: a run of 8 visits of each pair, with the preparation of its caches, in rounds that take
  turns; imports, the writing of the shards and of the random weights are not counted.

Neither flips images, so that a cache holds what is read; both drop a tenth of the prompts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from jsonargparse import auto_cli

from benchmarks import released_runs as runs
from benchmarks.common import write_report
from benchmarks.recipes import KINDS, Train
from lit_prefopt.estimate.memory import GIB

Sized = Literal["tiny", "toy", "sd15"]
Form = Literal["images", "cached", "reference"]
Measure = Literal["equal", "step", "memory", "whole"]
NAMES = {
    runs.RELEASED: "plain script",
    "images": "fit from images",
    "cached": "fit from a cache",
    "reference": "fit from a cache with the reference's errors",
}


def main(
    family: Sized = "toy",
    train: Train | None = None,
    forms: list[Form] | None = None,
    measures: list[Measure] | None = None,
    rounds: int = 3,
    steps: int = 5,
    equal_steps: int = 10,
    visits: int = 8,
    batch: int | None = None,
    pairs: int = 64,
    workers: int = 0,
    precision: Literal["32-true", "bf16-mixed"] | None = None,
    checkpointing: bool | None = None,
    options: str = "",
    folder: str = "runs/released-step",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        family: The model; `tiny` tries the script.
        train: All weights of the UNet, or a LoRA of rank 16; by default all in the toy world.
        forms: Forms of the fit's data; by default all.
        measures: What is measured; by default all.
        rounds: How often the two take turns.
        steps: Steps of each in a round.
        equal_steps: Steps whose losses are compared.
        visits: Of each pair in a whole run.
        batch: Pairs in a batch; by default the family's own number.
        pairs: How many pairs are made; the toy world has its own 1,024.
        workers: Processes that read and decode, of each; CPU seconds of a step leave them out.
        precision: By default the family's own.
        checkpointing: Whether both compute activations twice; by default at full size.
        options: More arguments of the fit, such as "--model.optimizer.fused true".
        folder: Where pipelines, shards and caches are written.
        report: Write a report as well.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    forms, measures = forms or [*Form.__args__], measures or [*Measure.__args__]  # type: ignore[attr-defined]
    setting = runs.Setting(
        family=family,
        train=train or ("full" if family == "toy" else "lora"),
        root=root,
        precision=precision or KINDS[family].precision,
        rows=batch or KINDS[family].batch,
        pairs=pairs,
        workers=workers,
        checkpointing=family == "sd15" if checkpointing is None else checkpointing,
        options=tuple(options.split()),
    )
    caches = setting.caches(_most(forms), root / f"{family}-{setting.train}-caches", 2)
    parts = [_head(setting, options)]
    if "equal" in measures:
        parts.append(equal_table(setting, forms, caches, equal_steps))
    if "step" in measures:
        parts.append(step_table(setting, forms, caches, rounds, steps))
    if "memory" in measures:
        parts.append(memory_table(setting, forms, folder))
    if "whole" in measures:
        parts.append(whole_table(setting, forms, rounds, visits))
    text = "\n\n".join(parts)
    print(text)
    if report:
        print(write_report("released_step", text, f"{family}-{setting.train}"))


def alone(setting: str, form: Literal["released", "images", "cached", "reference"]) -> None:
    """Print the peak memory of two steps in this process, as JSON.

    Args:
        setting: A `Setting` as JSON.
        form: The plain script, or the form of the fit's data.
    """
    known = runs.Setting(**json.loads(setting))
    known = known._replace(root=Path(known.root), options=tuple(known.options))
    folder = known.root / f"{known.family}-{known.train}-caches"
    before = runs.resident()
    peak = runs.peak_alone(known, form, (folder / "latents", folder / "errors"), 2)
    print(json.dumps({"peak": peak, "before": before}))


def equal_table(
    setting: runs.Setting, forms: list[Form], caches: tuple[Path, Path], steps: int
) -> str:
    """Return losses of both under the same draws, and the largest differences.

    Args:
        setting: What is trained.
        forms: Forms of the fit's data.
        caches: Folders of the caches.
        steps: How many steps.
    """
    first, images = runs.compare_losses(setting, "images", caches, steps)
    found = {"images": first}
    for form in forms:
        if form != "images":
            found[form], _ = runs.compare_losses(setting, form, caches, steps, images)
    lines = [
        f"## Equal maths: {steps} steps under the same draws (learning rate {runs.EQUAL_LR:g})",
        "",
        "| | largest difference of losses | farthest loss from ln 2 | largest difference of "
        "weights | largest change of a weight |",
        "|---|---|---|---|---|",
    ]
    for name, both in found.items():
        apart = max(abs(a - b) for a, b in zip(both.fit, both.released, strict=True))
        far = max(abs(loss - 0.6931471805599453) for loss in both.fit)
        lines.append(
            f"| {NAMES[name]} | {apart:.1e} | {far:.3g} | {both.weights:.1e} | {both.moved:.1e} |"
        )
    columns = [column for form in found for column in (NAMES[form], NAMES[runs.RELEASED])]
    lines += ["", f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for step in range(steps):
        losses = [loss for b in found.values() for loss in (b.fit[step], b.released[step])]
        lines.append(f"| {step + 1} | {' | '.join(f'{loss:.7f}' for loss in losses)} |")
    return "\n".join(lines)


def step_table(
    setting: runs.Setting,
    forms: list[Form],
    caches: tuple[Path, Path],
    rounds: int,
    steps: int,
) -> str:
    """Return seconds of a step, and how many times the plain script's pairs/s a fit makes.

    Args:
        setting: What is trained.
        forms: Forms of the fit's data.
        caches: Folders of the caches.
        rounds: How often the two take turns.
        steps: Of each in a round.
    """
    lines = [
        f"## A step: {rounds} rounds of {steps} steps of each, in turn",
        "",
        "Of each round the median step; medians of the rounds, with the lowest and the highest.",
        "",
        "| | CPU s, plain script | CPU s, fit | ratio by CPU s | wall s, plain script | wall s, "
        "fit | ratio by wall s |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in forms:
        costs = runs.take_rounds(setting, form, caches, rounds, steps)
        cells = []
        for clock in ("cpu", "wall"):
            plain, fit = (
                [median(getattr(cost, clock) for cost in part) for part in costs[whose]]
                for whose in (runs.RELEASED, "fit")
            )
            ratios = [p / f for p, f in zip(plain, fit, strict=True)]
            cells += [spread(plain), spread(fit), f"**{spread(ratios)}**"]
        lines.append(f"| {NAMES[form]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(setting: runs.Setting, forms: list[Form], folder: str) -> str:
    """Return the peak memory of each, in processes of their own.

    Args:
        setting: What is trained.
        forms: Forms of the fit's data.
        folder: Where its caches are.
    """
    lines = [
        "## Peak memory, in processes of their own",
        "",
        "| | peak, GiB | before the networks were loaded, GiB | ratio to the plain script |",
        "|---|---|---|---|",
    ]
    state = json.dumps({**setting._asdict(), "root": folder})
    peaks: dict[str, int] = {}
    for name in (runs.RELEASED, *forms):
        command = [sys.executable, "-m", "benchmarks.released_step", "alone"]
        command += ["--setting", state, "--form", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        run = json.loads(done.stdout.splitlines()[-1])
        peaks[name] = run["peak"]
        ratio = peaks[name] / peaks[runs.RELEASED]
        lines.append(
            f"| {NAMES[name]} | {run['peak'] / GIB:.3f} | {run['before'] / GIB:.3f} | {ratio:.3f} |"
        )
    return "\n".join(lines)


def whole_table(setting: runs.Setting, forms: list[Form], rounds: int, visits: int) -> str:
    """Return the costs of whole runs, preparation included.

    Args:
        setting: What is trained.
        forms: Forms of the fit's data.
        rounds: How often all take turns.
        visits: Of each pair.
    """
    names = [runs.RELEASED, *forms]
    costs: dict[str, list[runs.Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            costs[name].append(runs.whole_run(setting, name, visits))
    lines = [
        f"## Whole runs: {visits} visits of each pair, caches prepared, {rounds} rounds in turn",
        "",
        "| | CPU s | ratio by CPU s | wall s | ratio by wall s |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = []
        for clock in ("cpu", "wall"):
            own, plain = ([getattr(c, clock) for c in costs[n]] for n in (name, runs.RELEASED))
            ratios = [p / o for p, o in zip(plain, own, strict=True)]
            cells += [spread(own), f"**{spread(ratios)}**" if name != runs.RELEASED else ""]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return the median of some values, with the lowest and the highest."""
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _most(forms: list[Form]) -> Form:
    """Return the form that needs the most caches."""
    return max(forms, key=Form.__args__.index)  # type: ignore[attr-defined]


def _head(setting: runs.Setting, options: str) -> str:
    kind = KINDS[setting.family]
    doubled = "on" if setting.checkpointing else "off"
    more = f"; the fit with `{options}`" if options else ""
    return (
        f"{setting.family}, {setting.train}, {setting.rows} pairs of {kind.resolution} pixels, "
        f"{setting.precision}, checkpointing {doubled}, {setting.workers} workers{more}; "
        f"{torch.get_num_threads()} threads. The ratio is the plain script's seconds over the "
        "fit's: pairs/s of the fit as a multiple of the script's."
    )


if __name__ == "__main__":
    auto_cli({"main": main, "alone": alone}, as_positional=False)

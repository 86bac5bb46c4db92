"""The plots of `docs/reading-the-curves.md`: toy runs that go well, and some that do not.

    python -m experiments.curves

The runs are runs of comparisons; one that is not there is made, in about four minutes on two cores.
What was read of them is kept in `reports/curves.json`, from which a plot is drawn again without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.compare_methods.plan import PLANS, REPORTS, Comparison, load
from lit_prefopt.evaluate.statistics import bootstrap_interval

KEPT = REPORTS / "curves.json"
DOCS = Path(__file__).parents[1] / "docs" / "curves"


@dataclass
class Case:
    """One run and what its picture is called.

    Args:
        title: What is seen.
        plan: The comparison that makes the run.
        method: Its method there.
        seed: Of the run.
    """

    title: str
    plan: str
    method: str
    seed: int = 0

    @property
    def comparison(self) -> Comparison:
        """The comparison that makes the run."""
        return load(PLANS / f"{self.plan}.yaml")


CASES = {
    "healthy": Case(
        "Healthy: Diffusion-DPO, beta 5000, learning rate 3e-5", "toy-on-policy", "Diffusion-DPO"
    ),
    "smaller-beta": Case("A tenth of beta: 500", "toy-on-policy-why", "Diffusion-DPO, beta 500"),
    "beta-too-small": Case("Beta too small: 20", "toy-curves", "Diffusion-DPO, beta 20"),
    "learning-rate-high": Case(
        "Learning rate too high: Diffusion-DPO, 1e-4 in place of 3e-5",
        "toy-on-policy-tuning",
        "Diffusion-DPO 1e-4",
        seed=100,
    ),
    "learning-rate-too-high": Case(
        "Learning rate much too high: Diffusion-DPO, 3e-4", "toy-curves", "Diffusion-DPO, lr 3e-4"
    ),
    "learning-rate-too-high-on-policy": Case(
        "Learning rate too high on policy: D3PO, 1e-4 in place of 1e-5",
        "toy-on-policy-tuning",
        "D3PO 1e-4",
        seed=100,
    ),
    "reward-hacking": Case(
        "Reward hacking: SPO, a small learned judge",
        "toy-on-policy",
        "SPO, step-aware judge",
        seed=1,
    ),
    "displacement": Case(
        "Likelihood displacement: Consistency-DPO, learning rate 3e-5, no anchor",
        "toy-curves",
        "Consistency-DPO, untuned",
        seed=1,
    ),
}
LOGGED = (
    "train/loss",
    "train/accuracy",
    "train/judge",
    "train/chosen_error",
    "train/rejected_error",
    "train/chosen_reference_error",
    "train/rejected_reference_error",
)


def make(case: Case) -> None:
    """Make a case's run, and what it needs."""
    from experiments.compare_methods.runs import run  # it imports torch

    run(case.comparison, case.method, case.seed, threads=2)


def read(folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Return what a run has logged, and the true reward where it was measured.

    Args:
        folder: The run's directory.
        steps: How many it has taken; the last logged one where that is not known.
    """
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    names = [name for name in LOGGED if name in events.Tags()["scalars"]]
    series = {name: [[x.step + 1, x.value] for x in events.Scalars(name)] for name in names}
    losses = series["train/loss"]
    if losses[-1][1] == losses[-2][1]:  # what was logged last is logged again at the end
        series = {name: rows[:-1] for name, rows in series.items()}
    ends = _lines(folder / "evaluation" / "per_prompt.jsonl")
    before = np.array([row["reward_reference"] for row in ends])
    measured = folder / "curve.jsonl"
    points = [(p["step"], p["rewards"]) for p in (_lines(measured) if measured.exists() else [])]
    points.append((steps or int(losses[-1][0]), [row["reward_policy"] for row in ends]))
    rewards = [[0, float(before.mean()), 0.0, 0.0]]
    for step, values in points:
        gained = np.array(values) - before[: len(values)]
        rewards.append([step, float(before.mean() + gained.mean()), *bootstrap_interval(gained)])
    rounded = {name: _rounded(rows) for name, rows in {**series, "reward": rewards}.items()}
    return {"folder": "/".join(folder.parts[-2:]), **rounded}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in rows]


def draw(case: Case, found: dict[str, Any], path: Path) -> None:
    """Draw a run: loss, accuracy, what tells the case, and the true reward.

    Args:
        case: Its title stands above.
        found: What `read` returned.
        path: The picture to be made.
    """
    figure, panels = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    series = {name: np.array(rows) for name, rows in found.items() if name != "folder"}
    _line(panels[0], series["train/loss"], "train/loss")
    panels[0].axhline(np.log(2), color="grey", linewidth=0.8, linestyle=":")
    _line(panels[1], series["train/accuracy"], "train/accuracy")
    panels[1].axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    if "train/judge" in series:
        _line(panels[2], series["train/judge"], "train/judge: the judge that is learned from")
    else:
        _errors(panels[2], series)
    _reward(panels[3], series["reward"])
    for panel in panels:
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.suptitle(case.title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _line(panel: Axes, rows: NDArray[np.float64], title: str) -> None:
    panel.plot(rows[:, 0], rows[:, 1], marker=".", markersize=4)
    panel.set_title(title, fontsize=8)


def _errors(panel: Axes, series: dict[str, NDArray[np.float64]]) -> None:
    """Draw both sides' errors as multiples of the reference's: what timesteps add cancels."""
    for side, colour in (("chosen", "C2"), ("rejected", "C3")):
        policy, reference = series[f"train/{side}_error"], series[f"train/{side}_reference_error"]
        panel.plot(policy[:, 0], policy[:, 1] / reference[:, 1], label=side, color=colour)
    panel.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    panel.set_title("train/…_error over train/…_reference_error", fontsize=8)
    panel.legend(fontsize=7, loc="upper left")


def _reward(panel: Axes, rows: NDArray[np.float64]) -> None:
    start = rows[0, 1]
    low, high = rows[:, 1] - start - rows[:, 2], rows[:, 3] - (rows[:, 1] - start)
    panel.errorbar(rows[:, 0], rows[:, 1], yerr=[low, high], marker="o", markersize=3, color="C4")
    panel.axhline(start, color="grey", linewidth=0.8, linestyle=":")
    panel.set_title("true reward, 95 % of its change", fontsize=8)


def main(cases: list[str] | None = None, runs: str = "runs", made: bool = True) -> None:
    """Read and draw the runs, and print the true reward of each.

    Args:
        cases: Which; all where none is named.
        runs: Folder of the comparisons' runs.
        made: Whether a run that is neither there nor kept is made; else it is left out.
    """
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in cases or CASES:
        case = CASES[name]
        folder = Path(runs) / case.plan / f"{case.method.replace(' ', '-')}-seed{case.seed}"
        if name not in kept:
            if not (folder / "evaluation" / "evaluation.json").exists():
                if not made:
                    print(f"{name}: left out, since {folder} is not there")
                    continue
                make(case)
            rows = case.comparison.finished()
            known = {(row["method"], row["seed"]): row["steps"] for row in rows}
            kept[name] = read(folder, known.get((case.method, case.seed)))
            cases_kept = (f"{json.dumps(key)}: {json.dumps(one)}" for key, one in kept.items())
            KEPT.write_text("{" + ",\n".join(cases_kept) + "}\n")  # a case a line
        path = DOCS / f"{name}.png"
        draw(case, kept[name], path)
        rewards = ", ".join(f"{row[0]:.0f}: {row[1]:.3f}" for row in kept[name]["reward"])
        print(f"{path.name} ({path.stat().st_size // 1024} kB); true reward by step {rewards}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""Diffusion-DPO and its baseline in the toy world: true reward on held-out captions, over seeds.

    python -m benchmarks.toy_methods --seeds 3 --report true

Every run is a quickstart with another method file and seed, and is kept: a run that has its
evaluation.json already is not made again.
"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.common import write_report
from lit_prefopt.cli import main as lit_prefopt

METHODS = {"Diffusion-DPO": "diffusion-dpo-toy", "SFT": "sft-toy"}


def run(method: str, seed: int, folder: Path) -> dict:
    """Return the evaluation of one run, made now if it is not there yet."""
    root = folder / f"{method}-seed{seed}"
    evidence = root / "evaluation" / "evaluation.json"
    if not evidence.exists():
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        where = ["--trainer.default_root_dir", str(root)]
        lit_prefopt(
            ["fit", "--config", "quickstart", "--model", f"method/{method}.yaml", *seeds, *where]
        )
    return json.loads(evidence.read_text())


def main(seeds: int = 3, folder: str = "runs/toy-methods", report: bool = False) -> None:
    """Measure.

    Args:
        seeds: Runs of each method.
        folder: Where the runs lie.
        report: Write a report as well.
    """
    head = "| method | seed | reward before | after | difference | win rate |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, method in METHODS.items():
        for seed in range(seeds):
            e = run(method, seed, Path(folder))
            d, w = e["difference_ci"], e["win_rate_ci"]
            lines.append(
                f"| {name} | {seed} | {e['reward_reference']:.4f} | {e['reward_policy']:.4f} "
                f"| {e['difference']:+.4f} ({d[0]:+.4f} to {d[1]:+.4f}) "
                f"| {e['win_rate']:.3f} ({w[0]:.3f} to {w[1]:.3f}) |"
            )
    print("\n".join(lines))
    if report:
        print(write_report("toy_methods", "\n".join(lines)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

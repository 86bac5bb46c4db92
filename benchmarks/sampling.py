"""What roll-outs cost: of SPO for each decision and candidate, of dense reward for each image.

    python -m benchmarks.sampling --method spo
    python -m benchmarks.sampling --method dense-reward

The toy recipes with the exact judge; collections alone count. An evaluation is one row of a forward
of the denoiser; the floor of a part is its work over the matmul peak that this machine reaches in
the same minute. At full size, `spo_epoch` measures the same for SPO.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from benchmarks.common import write_report
from benchmarks.parts import COLLECTION, DENOISER, JUDGE, Parts
from lit_prefopt import load
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.utils.device import matmul_peak

Method = Literal["spo", "dense-reward"]
COLLECTED = (DENOISER, "decode", JUDGE, "the rest")


def table(parts: Parts, candidates: int, peak: float) -> str:
    """Return the figures of the collections.

    Args:
        parts: What was timed.
        candidates: Images that are judged together to one decision.
        peak: TFLOP/s of this machine.
    """
    rows = parts.rows[DENOISER][f"{COLLECTION}: {DENOISER}"]
    judged = sum(parts.rows["decoder"].values())
    work = parts.teraflops()
    lines = [
        f"{judged} images were judged, {candidates} at a time, for {rows} evaluations: "
        f"{rows / judged:.2f} an image.",
        "",
        "| part of a collection | ms an image | ms a decision | share | floor, ms an image |",
        "|---|---|---|---|---|",
    ]
    whole = sum(parts.seconds[f"{COLLECTION}: {name}"] for name in COLLECTED)
    for name in COLLECTED:
        seconds = parts.seconds[f"{COLLECTION}: {name}"]
        ms, tera = seconds / judged * 1e3, work[f"{COLLECTION}: {name}"] / judged
        floor = f"{tera / peak * 1e3:.2f}" if tera else ""
        share = seconds / whole
        lines.append(f"| {name} | {ms:.2f} | {ms * candidates:.1f} | {share:.1%} | {floor} |")
    ms = whole / judged * 1e3
    lines.append(f"| together | {ms:.2f} | {ms * candidates:.1f} | | |")
    return "\n".join(lines)


def main(
    method: Method = "spo",
    rounds: int = 1,
    folder: str = "runs/sampling",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        method: Whose roll-outs.
        rounds: Collections.
        folder: Where the run is written.
        report: Write a report as well.
    """
    run = Path(folder) / time.strftime("run-%Y%m%d-%H%M%S")
    batches = 1  # of a collection: training does not count here
    lit_prefopt(
        [
            *("fit", "--config", f"toy-{method}", "--trainer.max_steps", str(rounds * batches)),
            *("--data.batches", str(batches), "--trainer.limit_val_batches", "0"),
            *("--trainer.enable_progress_bar", "false"),
            *("--trainer.callbacks+", "benchmarks.parts.Parts"),
            *("--trainer.default_root_dir", str(run), "--trainer.accelerator", "auto"),
        ]
    )
    module: Any = load(run / "checkpoints" / "last.ckpt")
    candidates = module.candidates if method == "spo" else module.trajectories
    peak = matmul_peak(torch.float32)
    text = "\n".join(
        [
            f"toy-{method}, {rounds} collections; {torch.get_num_threads()} threads; the floor is "
            f"at {peak:.3g} TFLOP/s.",
            "",
            table(Parts.last, candidates, peak),
        ]
    )
    print(text)
    if report:
        print(write_report("sampling", text, method))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

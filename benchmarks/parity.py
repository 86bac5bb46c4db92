"""Losses of the same run under DDP, ZeRO and FSDP2: two CPU processes, float32 and bf16.

    python -m benchmarks.parity --report true

The toy world's Stable Diffusion and pairs, Diffusion-DPO; every strategy sees the same pairs, noise
and timesteps.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.common import write_report
from lit_prefopt.export.recipe import TOY
from tests.strategies.runs import CPU, STRATEGIES, run_cases

SHOWN = ("ddp", "zero2", "zero3", "fsdp")
FORMS = {
    "full": ["--model.optimizer.lr", "1e-4"],
    "LoRA": ["--backbone.lora.rank", "8", "--model.optimizer.lr", "1e-3"],
}
PRECISIONS = {
    "float32": ["--trainer.precision", "32-true"],
    # frozen weights in bf16, trained ones in float32 under autocast
    "bf16": ["--trainer.precision", "bf16-mixed", "--backbone.dtype", "bfloat16"],
}


def command(folder: Path, strategy: str, form: str, precision: str, steps: int) -> list[str]:
    """Return the command of one run."""
    return [
        *("fit", "--config", "toy-diffusion-dpo", "--data.batch_size", "8", "--batch.pairs", "16"),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", str(TOY)),
        *("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"),
        *("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder)),
        *(*STRATEGIES[strategy], "--trainer.devices", "2"),
        *(*FORMS[form], *PRECISIONS[precision]),
        *("--trainer.callbacks+", f"{CPU}.Seen", "--trainer.callbacks.folder", str(folder)),
    ]


def section(root: Path, form: str, precision: str, steps: int) -> list[str]:
    """Return the table of one form in one precision."""
    losses = {
        name: torch.load(root / f"{name}-{form}-{precision}" / "seen-0.pt", weights_only=True)[
            "losses"
        ]
        for name in SHOWN
    }
    table = [f"## {form}, {precision}", "", f"| step | {' | '.join(SHOWN)} |"]
    table += ["|---" * (len(SHOWN) + 1) + "|"]
    for step in range(steps):
        row = " | ".join(f"{losses[name][step]:.6f}" for name in SHOWN)
        table.append(f"| {step + 1} | {row} |")
    apart = {
        name: max(abs(a - b) for a, b in zip(losses[name], losses["ddp"], strict=True))
        for name in SHOWN[1:]
    }
    told = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    away = max(abs(loss - math.log(2)) for loss in losses["ddp"])
    return [*table, "", f"Farthest from DDP: {told}; DDP from ln 2: {away:.3f}.", ""]


def main(steps: int = 10, report: bool = False) -> None:
    """Measure.

    Args:
        steps: Optimizer steps of each run.
        report: Write a report as well.
    """
    kinds = [(form, precision) for precision in PRECISIONS for form in FORMS]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases = [
            command(root / f"{strategy}-{form}-{precision}", strategy, form, precision, steps)
            for form, precision in kinds
            for strategy in SHOWN
        ]
        run_cases(cases, root / "cases.json")
        text = "\n".join(line for kind in kinds for line in section(root, *kind, steps))
    print(text)
    if report:
        print(write_report("parity", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

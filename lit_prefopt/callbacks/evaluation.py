"""The evidence: policy against reference on held-out prompts, after `fit` and in `test`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from lit_prefopt.diffusion.sampling import Sampling
from lit_prefopt.evaluate.comparison import compare, summarise, write_rows
from lit_prefopt.evaluate.prompts import Prompts
from lit_prefopt.evaluate.report import before_after, table
from lit_prefopt.judges import Judge
from lit_prefopt.module import PreferenceDiffusionModule


class Evaluation(Callback):
    """Samples policy and reference with the same seeds and lets a judge compare them.

    In the run's directory it writes `evaluation/evaluation.json` (means, paired difference and win
    rate with 95 % intervals), `per_prompt.jsonl` and `before-after.png`.

    Args:
        judge: Scores the images.
        prompts: Held-out prompts.
        sampling: Settings of the sampler.
        seed: Seed of the first prompt's image; the others follow.
        pictures: Number of prompts in the picture.
        folder: Name of the folder inside the run's directory.
    """

    def __init__(
        self,
        judge: Judge,
        prompts: Prompts,
        sampling: Sampling | None = None,
        seed: int = 0,
        pictures: int = 8,
        folder: str = "evaluation",
    ) -> None:
        self.judge = judge
        self.prompts = prompts
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.pictures = pictures
        self.folder = folder
        self._started = 0.0
        self._seconds: dict[str, float] = {}
        self._curve: list[tuple[int, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the prompts now, so that a missing file stops the run before it has begun."""
        self.prompts.texts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out accuracy, and print it beside what a coin would reach."""
        metrics = trainer.callback_metrics
        if trainer.state.fn == "fit" and "val/accuracy" in metrics:
            accuracy, coin = (float(metrics[f"val/{name}"]) for name in ("accuracy", "coin"))
            self._curve.append((trainer.global_step, round(accuracy, 4)))
            rank_zero_info(
                f"step {trainer.global_step}: held-out accuracy {accuracy:.3f} (a coin: 0.5, and "
                f"below {coin:.3f} in 39 of 40 cases)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds = {"seconds_fit": round(time.monotonic() - self._started, 1)}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what was trained."""
        self.run(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a checkpoint."""
        self.run(trainer, pl_module)

    def run(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare the two models and write the evidence (rank zero)."""
        if not trainer.is_global_zero or not isinstance(module, PreferenceDiffusionModule):
            return
        texts = self.prompts.texts()
        seeds = torch.arange(len(texts)) + self.seed
        begun = time.monotonic()
        module.eval()
        with trainer.precision_plugin.forward_context():
            rows, before, after = compare(module.backbone, self.judge, texts, seeds, self.sampling)
        summary: dict[str, Any] = summarise(rows)
        summary |= {**self._seconds, "seconds_evaluation": round(time.monotonic() - begun, 1)}
        summary["held_out_accuracy"] = self._curve
        folder = Path(trainer.default_root_dir) / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n")
        write_rows(rows, folder / "per_prompt.jsonl")
        some = slice(0, self.pictures)
        before_after(rows[some], before[some], after[some]).save(folder / "before-after.png")
        Console().print(table(summary))
        print(f"Evidence: {folder}/evaluation.json, per_prompt.jsonl, before-after.png")

"""Reward against training cost: score the policy during training as the evaluation does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.callbacks.budget import Budget
from lit_prefopt.callbacks.evaluation import Evaluation
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.judges.judge import checked_scores, full_precision
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.utils.atomic_files import write_atomic


class RewardCurve(Callback):
    """Samples the policy at given costs and scores it with the evaluation's judge.

    It needs the callbacks `Budget`, which counts the cost, and `Evaluation`, whose judge, prompts,
    settings and seeds it uses: its points are comparable with the final evaluation. It does not
    change the training. `curve.jsonl` in the run's directory has a line per point: the cost so
    far, and the reward of every prompt.

    Args:
        at: Denoiser evaluations at which to score, in ascending order; each point follows the
            first batch that has reached it.
        count: Number of the evaluation's prompts, from the first one on; all by default.
    """

    def __init__(self, at: list[int], count: int | None = None) -> None:
        for point in at:
            check_number("at", point, 1)
        if sorted(set(at)) != at:
            raise InputError(
                f"at is {at}: give numbers of evaluations in strictly ascending order."
            )
        check_number("count", count, 1, optional=True)
        self.at, self.count = at, count
        self._points: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the run has Budget and Evaluation."""
        self._find_callbacks(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the policy of a resumed run if it has passed points that were added."""
        self._score_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score the policy if the next point is reached."""
        self._score_due(trainer, pl_module)

    def _score_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        budget, evaluation = self._find_callbacks(trainer)
        due = [point for point in self.at if point <= budget.spent]
        if len(due) <= len(self._points) or not isinstance(pl_module, PreferenceDiffusionModule):
            return
        spent = {
            "evaluations": budget.spent,
            "pairs": budget.seen,
            "judge_calls": budget.judged,
            "step": trainer.global_step,
        }
        begun = time.monotonic()
        with budget.paused():  # on all ranks: with sharded weights, each forward needs all
            rewards = self._rewards(trainer, pl_module, evaluation)
        measured = {"seconds": round(time.monotonic() - begun, 1), "rewards": rewards}
        # a batch that passes several points at once is one measurement for all of them
        self._points += [spent | measured] * (len(due) - len(self._points))
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir))

    @torch.no_grad()
    def _rewards(
        self, trainer: Trainer, module: PreferenceDiffusionModule, evaluation: Evaluation
    ) -> list[float]:
        texts = evaluation.prompts.texts()[: self.count]
        seeds = torch.arange(len(texts)) + evaluation.seed
        how = evaluation.sampling or module.backbone.sampling
        training = module.training
        module.eval()
        with trainer.precision_plugin.forward_context():
            images = sample(module.backbone, texts, seeds, how)
        module.train(training)
        with full_precision(images) as seen:
            scores = checked_scores(evaluation.scorers.judge, seen, texts)
        return [round(score, 6) for score in scores.tolist()]

    def _find_callbacks(self, trainer: Trainer) -> tuple[Budget, Evaluation]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        budgets = [one for one in callbacks if isinstance(one, Budget)]
        evaluations = [one for one in callbacks if isinstance(one, Evaluation)]
        if not budgets or not evaluations:
            raise InputError(
                "RewardCurve needs Budget for the cost and Evaluation for the judge: add both "
                "before it, by --trainer.callbacks+=Budget and --trainer.callbacks+=Evaluation."
            )
        if callbacks.index(budgets[0]) > callbacks.index(self):
            raise InputError(
                "RewardCurve must come after Budget, which counts the batch: list it last."
            )
        return budgets[0], evaluations[0]

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(point, allow_nan=False) + "\n" for point in self._points)
        write_atomic(folder / "curve.jsonl", "".join(lines))

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far, for resume."""
        return {"points": self._points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points."""
        self._points = list(state_dict["points"])

"""Methods on equal terms: so much of something, then the run stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_prefopt.errors import check_number
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.on_policy import OnPolicyModule


class Budget(Callback):
    """Counts what a training asks of denoisers, pairs and judge, and stops it in time.

    Collections belong to it. A row of a forward counts 1, with gradients 3, since its backward
    costs two more; guidance doubles the rows. Validation, sample grids and evaluations cost
    nothing. A pair counts each time that it is learned from; so does a picture, where a method
    learns from single ones. An image counts each time that a method asks its judge about it. The
    run stops after the batch in which a rank reaches a limit, so the last collection may exceed it.

    Args:
        evaluations: Evaluations of policy, reference and teacher on each rank; they are only
            counted where no limit is given, as is the rest.
        pairs: Pairs that each rank learns from.
        judge_calls: Images about which each rank asks the method's judge.
    """

    def __init__(
        self,
        evaluations: int | None = None,
        pairs: int | None = None,
        judge_calls: int | None = None,
    ) -> None:
        check_number("evaluations", evaluations, 1)
        check_number("pairs", pairs, 1)
        check_number("judge_calls", judge_calls, 1)
        self.evaluations, self.pairs, self.judge_calls = evaluations, pairs, judge_calls
        self.spent = self.seen = self.judged = 0
        self._judged_before = 0
        self._counting = True
        self._hooks: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        if not isinstance(pl_module, PreferenceDiffusionModule):
            return
        policy = pl_module.backbone.policy
        nets = policy.denoiser, policy.frozen, getattr(pl_module.backbone, "teacher", None)
        counted = [net for net in nets if net is not None]
        self._hooks = [net.register_forward_pre_hook(self._count) for net in counted]
        self._judged_before = self.judged
        if isinstance(pl_module, OnPolicyModule):
            self._judged_before -= pl_module.images_judged

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause."""
        self._counting = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._counting = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no evaluation inside the block."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was spent, and stop on all ranks together where it is enough."""
        if not isinstance(pl_module, PreferenceDiffusionModule):
            return
        self.seen += len(batch.seeds)
        if isinstance(pl_module, OnPolicyModule):
            self.judged = self._judged_before + pl_module.images_judged
        spent = {"evaluations": self.spent, "pairs": self.seen, "judge_calls": self.judged}
        for name, value in spent.items():
            pl_module.log(f"train/{name}", float(value), reduce_fx="max", batch_size=1)
        limits = {name: limit for name in spent if (limit := getattr(self, name)) is not None}
        if limits:
            enough = any(spent[name] >= limit for name, limit in limits.items())
            trainer.should_stop |= trainer.strategy.reduce_boolean_decision(enough, all=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent, so that a resumed run goes on from there."""
        return {"spent": self.spent, "pairs": self.seen, "judge_calls": self.judged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.spent = state_dict["spent"]
        self.seen, self.judged = state_dict.get("pairs", 0), state_dict.get("judge_calls", 0)

    def _count(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        if self._counting:
            self.spent += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

"""Budget of denoiser evaluations, pairs or judge calls, for comparing methods at equal cost."""

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
    """Counts denoiser evaluations, pairs and judge calls, and stops training at a limit.

    Roll-outs are included. A row of a forward counts 1, with gradients 3, since its backward costs
    two more; guidance doubles the rows. Validation, sample grids, evaluations and the check of the
    base are not counted. A pair counts each time that it is trained on; so does an image in
    methods that train on single images. An image counts each time that the method's judge scores
    it. The run stops after the batch in which a rank reaches a limit, so the last roll-out may
    exceed it.

    Args:
        evaluations: Limit of evaluations of policy, reference and teacher per rank; each quantity
            without a limit is only counted.
        pairs: Limit of training pairs per rank.
        judge_calls: Limit of images scored by the method's judge per rank.
    """

    def __init__(
        self,
        evaluations: int | None = None,
        pairs: int | None = None,
        judge_calls: int | None = None,
    ) -> None:
        check_number("evaluations", evaluations, 1, optional=True)
        check_number("pairs", pairs, 1, optional=True)
        check_number("judge_calls", judge_calls, 1, optional=True)
        self.evaluations, self.pairs, self.judge_calls = evaluations, pairs, judge_calls
        self.spent = self.seen = self.judged = 0
        self._judged_before = 0
        self._counting = True
        self._module: PreferenceDiffusionModule | None = None
        self._hooks: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        if not isinstance(pl_module, PreferenceDiffusionModule):
            return
        self._module = pl_module
        policy = pl_module.backbone.policy
        nets = policy.denoiser, policy.frozen, getattr(pl_module.backbone, "teacher", None)
        counted = [net for net in nets if net is not None]
        self._hooks = [
            net.register_forward_pre_hook(self._count, with_kwargs=True) for net in counted
        ]
        self._judged_before = self.judged
        if isinstance(pl_module, OnPolicyModule):
            self._judged_before -= pl_module.images_judged

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause counting."""
        self._counting = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._counting = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause counting inside the block."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the counts, and stop all ranks together if a limit is reached."""
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
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for resume."""
        return {"spent": self.spent, "pairs": self.seen, "judge_calls": self.judged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.spent = state_dict["spent"]
        self.seen, self.judged = state_dict.get("pairs", 0), state_dict.get("judge_calls", 0)

    def _count(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = next(iter((*args, *kwargs.values())))  # some families pass a list of them
        checking = self._module is not None and self._module.checking_base
        if self._counting and not checking:
            self.spent += len(latents) * (3 if torch.is_grad_enabled() else 1)

"""Methods on equal terms: so many evaluations of the denoiser, then the run stops."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_prefopt.errors import check_number
from lit_prefopt.module import PreferenceDiffusionModule


class Budget(Callback):
    """Counts what policy, reference and teacher are asked in training, and stops in time.

    Collections belong to it. A row of a forward counts 1, with gradients 3, since its backward
    costs two more; guidance doubles the rows. Validation, sample grids and the evaluation at the
    end cost nothing. The run stops after the batch in which a rank reaches the budget, so the last
    collection may exceed it.

    Args:
        evaluations: The budget of each rank; it is only counted where none is given.
    """

    def __init__(self, evaluations: int | None = None) -> None:
        check_number("evaluations", evaluations, 1)
        self.evaluations = evaluations
        self.spent = 0
        self._counting = True
        self._hooks: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        if not isinstance(pl_module, PreferenceDiffusionModule):
            return
        policy = pl_module.backbone.policy
        nets = policy.denoiser, policy.frozen, getattr(pl_module.backbone, "teacher", None)
        asked = [net for net in nets if net is not None]
        self._hooks = [net.register_forward_pre_hook(self._count) for net in asked]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause."""
        self._counting = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._counting = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what was spent, and stop on all ranks together where it is enough."""
        pl_module.log("train/evaluations", float(self.spent), reduce_fx="max", batch_size=1)
        if self.evaluations is not None:
            enough = self.spent >= self.evaluations
            trainer.should_stop |= trainer.strategy.reduce_boolean_decision(enough, all=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent, so that a resumed run goes on from there."""
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.spent = state_dict["spent"]

    def _count(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        if self._counting:
            self.spent += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

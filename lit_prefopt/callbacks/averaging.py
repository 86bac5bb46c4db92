"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_prefopt.backbones import trained
from lit_prefopt.errors import InputError, check_number


class PolicyAveraging(Callback):
    """Averages what is trained, and nothing else, after every optimizer step.

    The average takes the weights' place in validation and testing and when training ends; a
    checkpoint's `state_dict` holds the average, and the running weights beside it, so that a
    resumed run goes on to the last bit. Lightning's own averaging copies, averages and stores the
    frozen parts too, and cannot resume without them.

    Args:
        decay: Share of the old average that is kept at each step.
        start: Optimizer step from which on the average is kept; before, it is the weights.
    """

    RUNNING = "running_state"

    def __init__(self, decay: float = 0.999, start: int = 0) -> None:
        check_number("decay", decay, 0, 1)
        check_number("start", start, 0)
        self.decay, self.start = decay, start
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average."""
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if any(callback.save_weights_only for callback in saving):
            raise InputError(
                "Checkpoints of weights only hold no average: leave `save_weights_only` of the "
                "checkpoint callback false, or drop PolicyAveraging."
            )
        if any(p.dtype != torch.float32 for p in trained(pl_module).values()):
            raise InputError(
                "An average of weights in bfloat16 would round away what a step adds to it: drop "
                "PolicyAveraging, or set `--backbone.policy_dtype float32`."
            )
        if self._swapped:  # a second fit of the same trainer
            self._swap(pl_module)
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in trained(pl_module).items()}
        device = pl_module.device
        self.average = {name: value.to(device) for name, value in self.average.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the average towards the weights, once per optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = self.decay if self._step > self.start else 0.0
        weights = [p.detach() for p in trained(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the running weights."""
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module, for exports and evaluation.

        The last checkpoint is written after this, and still holds both.
        """
        self._swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last update."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the step of the last update."""
        self._step = state_dict["step"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average as the module's weights, and the running weights beside it."""
        if not self.average:
            return
        state = checkpoint["state_dict"]
        running = self.average if self._swapped else {name: state[name] for name in self.average}
        average = {name: state[name] for name in running} if self._swapped else self.average
        checkpoint[self.RUNNING] = {name: value.clone() for name, value in running.items()}
        checkpoint["state_dict"] = state | {name: v.clone() for name, v in average.items()}

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up average and running weights; a checkpoint without an average starts one."""
        if self.RUNNING not in checkpoint or trainer.state.fn != "fit":
            return
        weights = trained(pl_module)
        self._swapped = False
        self.average = {name: checkpoint["state_dict"][name].clone() for name in weights}
        for name, parameter in weights.items():
            parameter.copy_(checkpoint[self.RUNNING][name])

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for name, parameter in trained(pl_module).items():
            running = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(running)
        self._swapped = not self._swapped

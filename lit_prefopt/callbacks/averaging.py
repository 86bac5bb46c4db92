"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_prefopt.backbones import trained
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.moving_average import WeightAverage


class PolicyAveraging(WeightAverage):
    """Exponential moving average (EMA) of the trained weights, updated after every optimizer step.

    The average replaces the weights in validation and testing and when training ends; a
    checkpoint's `state_dict` holds the average, and the running weights beside it, so that a
    resumed run is bit-exact. Lightning's own averaging copies, averages and stores the
    frozen parts too, and cannot resume without them.

    Args:
        decay: Weight of the old average at each step.
        start: Optimizer step at which averaging starts; before it, the average equals the weights.
    """

    RUNNING = "running_state"
    CURE = "remove PolicyAveraging"

    def __init__(self, decay: float = 0.999, start: int = 0) -> None:
        check_number("decay", decay, 0, 1)
        check_number("start", start, 0)
        super().__init__()
        self.decay, self.start = decay, start
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialize the average from the weights, unless a checkpoint contained one."""
        if self._swapped:  # a second fit of the same trainer
            self._swap(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average once per optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = self.decay if self._step > self.start else 0.0
        self.follow(pl_module, decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the average for validation."""
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the running weights."""
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the average for export and evaluation.

        The last checkpoint is written after this, and still contains both.
        """
        self._swap(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average as the module's weights, and the running weights beside it."""
        if not self.average:
            return
        standing = self._copy(checkpoint["state_dict"])
        self._swap(pl_module)
        other = self._copy(trainer.strategy.lightning_module_state_dict())
        self._swap(pl_module)
        running, average = (other, standing) if self._swapped else (standing, other)
        checkpoint[self.RUNNING] = running
        checkpoint["state_dict"] = checkpoint["state_dict"] | average

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load average and running weights; initialize the average if the checkpoint has none.

        Raises:
            InputError: The running weights are not those that are averaged.
        """
        if self.RUNNING not in checkpoint or trainer.state.fn != "fit":
            return
        shapes = [
            {name: value.shape for name, value in checkpoint[key].items()}
            for key in ("state_dict", self.RUNNING)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(
                "The checkpoint's running weights are not those of its average, so it is damaged: "
                "resume from another one, or without PolicyAveraging."
            )
        self._swapped = False
        # the weights that were loaded
        self.average = {n: p.detach().clone() for n, p in trained(pl_module).items()}
        running = {"state_dict": checkpoint[self.RUNNING]}
        trainer.strategy.load_model_state_dict(running, strict=False)

    def _copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of the averaged part of a state dict; of sharded weights on rank zero."""
        return {name: state[name].clone() for name in self.average if name in state}

    def _swap(self, pl_module: LightningModule) -> None:
        self.swap(pl_module)
        self._swapped = not self._swapped

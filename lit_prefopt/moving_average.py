"""Moving averages of the trained weights: how they are kept, stored and swapped in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_prefopt.backbones import trained
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.strategies import ZeRO


class WeightAverage(Callback):
    """Base class of moving averages of the trained weights, which follow them on every rank."""

    CURE = "take another method"
    """How to do without the average, for messages."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialize the average from the weights, unless a checkpoint contained one.

        Raises:
            InputError: The run cannot keep or store it.
        """
        name = type(self).__name__
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if any(callback.save_weights_only for callback in saving):
            raise InputError(
                "Checkpoints with weights only do not store the average: set `save_weights_only` "
                f"of the checkpoint callback to false, or {self.CURE}."
            )
        if any(p.dtype != torch.float32 for p in trained(pl_module).values()):
            raise InputError(
                "An average of bfloat16 weights would lose each step's update to rounding: "
                f"{self.CURE}, or set `--backbone.policy_dtype float32`."
            )
        if isinstance(trainer.strategy, ZeRO) and trainer.strategy.stage == 3:
            raise InputError(
                f"{name} does not support weights sharded by ZeRO stage 3: use "
                "`--trainer hardware/fsdp.yaml`, which shards them too, or stage 2."
            )
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in trained(pl_module).items()}
        device = pl_module.device
        self.average = {name: value.to(device) for name, value in self.average.items()}

    @torch.no_grad()
    def follow(self, pl_module: LightningModule, decay: float) -> None:
        """Move the average towards the weights.

        Args:
            pl_module: The module whose weights are averaged.
            decay: Weight of the old average.
        """
        weights = [p.detach() for p in trained(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @torch.no_grad()
    def swap(self, pl_module: LightningModule) -> None:
        """Exchange the module's weights and the average."""
        for name, parameter in trained(pl_module).items():
            running = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(running)

    def gathered(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the average as a checkpoint stores it; of sharded weights on rank zero."""
        self.swap(pl_module)
        state = trainer.strategy.lightning_module_state_dict()
        found = {name: state[name].clone() for name in self.average if name in state}
        self.swap(pl_module)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last update."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last update."""
        self._step = state_dict["step"]


@dataclass
class AverageSchedule:
    """Weight of the old average in the updates of a moving average, which are made when epochs end.

    The default is the released one of DiffusionNFT for most rewards; its other one has start 75,
    rate 0.0075 and limit 0.999.

    Args:
        rate: Amount by which the weight rises at every optimizer step.
        limit: Largest weight.
        start: Optimizer step from which it rises; until then the average is the weights themselves.
    """

    rate: float = 0.001
    limit: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        """Check the range of all numbers."""
        check_number("rate", self.rate, 0)
        check_number("limit", self.limit, 0, 1)
        check_number("start", self.start, 0)

    def decay(self, step: int) -> float:
        """Return the weight of the old average in an update after this optimizer step."""
        return min(max(step - self.start, 0) * self.rate, self.limit)


class SamplingAverage(WeightAverage):
    """Moving average that samples: updated when a collection, or a pass over stored images, ends.

    It is stored in checkpoints beside the weights, so that a resumed run is exact to the last bit.

    Args:
        schedule: Weight of the old average in an update.
    """

    KEY = "sampling_average"

    def __init__(self, schedule: AverageSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    @contextmanager
    def active(self, pl_module: LightningModule) -> Iterator[None]:
        """Use the average inside the block; the weights themselves before training starts."""
        if not self.average:
            yield
            return
        self._exchange(pl_module)
        try:
            yield
        finally:
            self._exchange(pl_module)

    def _exchange(self, pl_module: LightningModule) -> None:
        self.swap(pl_module)
        torch.clear_autocast_cache()  # it holds half-precision copies of the other weights

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average after the last optimizer step of an epoch."""
        if trainer.is_last_batch and trainer.global_step != self._step:
            self._step = trainer.global_step
            self.follow(pl_module, self.schedule.decay(self._step))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average."""
        if self.average:
            checkpoint[self.KEY] = self.gathered(trainer, pl_module)

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average of a run that is resumed.

        Raises:
            InputError: The checkpoint has none, or one of other weights.
        """
        if trainer.state.fn != "fit":
            return
        own = trained(pl_module)
        saved = checkpoint.get(self.KEY, {})
        shapes = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise InputError(
                "The checkpoint has no average of its weights, from which this method samples: "
                "resume from a checkpoint of the same method."
            )
        running = {name: p.detach().clone() for name, p in own.items()}
        trainer.strategy.load_model_state_dict({"state_dict": saved}, strict=False)
        self.average = {name: p.detach().clone() for name, p in own.items()}
        for name, parameter in own.items():
            parameter.copy_(running[name])

"""Optimizers and learning-rate schedules; which weights they move is the module's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import optimization

from lit_prefopt.errors import InputError, check_number

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]
DECAYING = ("linear", "cosine")


class OptimizerConfig(ABC):
    """An optimizer with its learning-rate schedule, built once the parameters are known.

    Args:
        lr: Learning rate after the warm-up.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
    """

    def __init__(
        self, lr: float, schedule: ScheduleName = "constant", warmup_steps: int = 0
    ) -> None:
        check_number("lr", lr, 0)
        check_number("warmup_steps", warmup_steps, 0)
        self.lr, self.schedule, self.warmup_steps = lr, schedule, warmup_steps

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer of these parameters."""

    def build_schedule(self, optimizer: Optimizer, max_steps: int) -> LRScheduler:
        """Return the schedule, stepped once per optimizer step.

        Args:
            optimizer: What `build` returned.
            max_steps: `trainer.max_steps`; a decaying schedule ends there.

        Raises:
            InputError: The schedule decays and the run has no last step.
        """
        if self.schedule in DECAYING and max_steps <= 0:
            raise InputError(
                f"The schedule {self.schedule!r} decays to the run's last step: set "
                "`--trainer.max_steps N`, or take the schedule constant_with_warmup."
            )
        return get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=max(max_steps, 1),
        )


class AdamW(OptimizerConfig):
    """torch.optim.AdamW.

    Args:
        lr: Learning rate after the warm-up.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(lr, schedule, warmup_steps)
        for beta in betas:
            check_number("betas", beta, 0, 1 - 1e-12)
        check_number("eps", eps, 0)
        check_number("weight_decay", weight_decay, 0)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return torch's AdamW, not fused: Lightning's mixed precision cannot clip with that."""
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay)


class Adafactor(OptimizerConfig):
    """Adafactor (arXiv 1804.04235) with a learning rate of one's own: no scaling by the weights.

    Its second moments are kept by row and column, so a full fine-tune needs little memory for them.

    Args:
        lr: Learning rate after the warm-up.
        clip_threshold: Largest root mean square of an update before the learning rate.
        weight_decay: Decoupled weight decay.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
    """

    def __init__(
        self,
        lr: float,
        clip_threshold: float = 1.0,
        weight_decay: float = 1e-2,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(lr, schedule, warmup_steps)
        self.clip_threshold, self.weight_decay = clip_threshold, weight_decay

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return transformers' Adafactor."""
        return optimization.Adafactor(
            parameters,
            self.lr,
            clip_threshold=self.clip_threshold,
            weight_decay=self.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )

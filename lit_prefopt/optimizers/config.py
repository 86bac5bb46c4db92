"""Base class of optimizer configurations: a learning rate and its schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_prefopt.errors import InputError, check_number, quoted

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]
DECAYING = ("linear", "cosine")


class OptimizerConfig(ABC):
    """An optimizer with its learning-rate schedule, built once the parameters are known.

    Args:
        lr: Learning rate after the warm-up.
        schedule: Name of the schedule as diffusers defines it.
        warmup_steps: Optimizer steps over which the learning rate rises from zero.
    """

    supports_bf16_weights: bool = False
    """Whether bfloat16 weights can be trained at usual learning rates."""

    releases: bool = False
    """Whether gradients are released in the backward pass."""

    def __init__(
        self, lr: float, *, schedule: ScheduleName = "constant", warmup_steps: int = 0
    ) -> None:
        check_number("lr", lr, 0)
        check_number("warmup_steps", warmup_steps, 0)
        self.lr, self.schedule, self.warmup_steps = lr, schedule, warmup_steps

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the optimizer of these parameters."""

    def state_bytes(self, parameter: nn.Parameter) -> int:
        """Return the bytes of a parameter's optimizer state, without scalars.

        By default two moments in the weights' precision, as Adam has; others override it.
        """
        return 2 * parameter.numel() * parameter.element_size()

    def build_schedule(self, optimizer: Optimizer, max_steps: int) -> LRScheduler:
        """Build the learning-rate schedule, which is stepped once per optimizer step.

        Args:
            optimizer: The optimizer that `build` returned.
            max_steps: Optimizer steps of the run, where a decaying schedule ends; -1 if the run
                has no end.

        Raises:
            InputError: The schedule decays and the run has no last step.
        """
        if self.schedule in DECAYING and max_steps <= 0:
            raise InputError(
                f"The schedule {quoted(self.schedule)} decays to the run's last step: set "
                "`--trainer.max_steps N` or `--trainer.max_epochs N`, or take the schedule "
                "constant_with_warmup."
            )
        return get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=max(max_steps, 1),
        )


def check_moments(betas: tuple[float, float], weight_decay: float) -> None:
    """Check the range of decay rates and weight decay."""
    for beta in betas:
        check_number("betas", beta, 0, 1 - 1e-12)
    check_number("weight_decay", weight_decay, 0)

"""Resume an optimizer by the recipe: its settings and schedule hold, its moments are kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_prefopt.errors import InputError
from lit_prefopt.optimizers.config import OptimizerConfig

OPTIMIZER = "optimizer"
"""Key of a checkpoint for the class of its optimizer."""


def apply_recipe(
    checkpoint: dict[str, Any],
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    max_steps: int,
) -> None:
    """Write the recipe's settings and schedule into the optimizer's state of a checkpoint.

    A checkpoint holds learning rate, weight decay and betas beside the moments, and whoever loads
    its state loads those as well. The learning rate becomes the one that the recipe's schedule has
    at the checkpoint's step. The moments of another optimizer are dropped, with a warning.

    Args:
        checkpoint: The checkpoint, which is changed.
        config: The recipe's optimizer.
        parameters: The trained parameters.
        max_steps: Optimizer steps of the run, as for `build_schedule`.

    Raises:
        InputError: The checkpoint has not the state of one optimizer and its schedule.
    """
    try:
        [saved_schedule], [saved] = checkpoint["lr_schedulers"], checkpoint["optimizer_states"]
        steps, groups = int(saved_schedule["last_epoch"]), len(saved["param_groups"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "The checkpoint has not the state of one optimizer and its schedule: resume from "
            "another one, or start a new run from its weights as `lit-prefopt export` writes them."
        ) from error
    # over the same memory; it is never stepped
    optimizer = config.build([nn.Parameter(p.detach(), p.requires_grad) for p in parameters])
    schedule = config.build_schedule(optimizer, max_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that is stepped before its optimizer
        for _ in range(steps):
            schedule.step()
    checkpoint["lr_schedulers"] = [schedule.state_dict()]
    own = optimizer.state_dict()["param_groups"]
    before, now = checkpoint.get(OPTIMIZER), name_of(config)
    if before in (None, now) and groups == len(own):
        checkpoint["optimizer_states"] = [{**saved, "param_groups": own}]
        return
    checkpoint["optimizer_states"] = [{"state": {}, "param_groups": own}]
    rank_zero_warn(
        f"The recipe's optimizer, {now}, cannot use the moments of the checkpoint's, {before}: "
        "they start at zero, while weights, step, schedule and the position in the data are kept."
    )


def name_of(config: OptimizerConfig) -> str:
    """Return the name of an optimizer's class."""
    return type(config).__name__

"""Build the noise levels of a flow from its scheduler's configuration; refuse all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lit_prefopt.errors import InputError, check_number, quoted

FLOW_SCHEDULERS = frozenset({"FlowMatchEulerDiscreteScheduler"})
"""Scheduler classes of diffusers that sample a rectified flow and whose levels are known here."""

Shift = Callable[[Mapping[str, Any], int, int], float]
"""Shift mu of noise levels, given the scheduler's configuration, image tokens and steps."""

Linear = bool | Literal["float32"]
"""Whether levels fall linearly from 1 to 1/n before the shift, and the precision of them."""

STEPS = 1000
"""Number of timesteps of all published flows; the network's time is 1000 sigma."""

DDPM_FIELDS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type")
"""Fields of a configuration that are DDPM's alone."""

OTHER_FLOWS = {
    "invert_sigmas": "its levels run from image to noise",
    "stochastic_sampling": "its sampler adds noise at every step, as those of distilled models",
}
"""Switches of flows that are not sampled by Euler steps from noise to image."""


def flow_schedule(config: dict[str, Any], *, has_mu: bool) -> FlowMatchEulerDiscreteScheduler:
    """Return a new scheduler of a rectified flow.

    Args:
        config: The checkpoint's scheduler configuration, as diffusers stores it.
        has_mu: Whether the family has a shift that depends on the resolution.

    Raises:
        InputError: Another noise process, or a configuration that contradicts itself.
    """
    _check_class(config)
    stated = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in DDPM_FIELDS:
        if stated.get(name) is not None:
            raise InputError(
                f"The checkpoint's scheduler has {name} {quoted(stated[name])}, a field of DDPM's, "
                "so its noise process is not a rectified flow's: name a checkpoint of a flow, or "
                f"remove {name} from its scheduler_config.json."
            )
    for name, meaning in OTHER_FLOWS.items():
        if stated.get(name):
            raise InputError(
                f"The checkpoint's scheduler has {name}, so {meaning}, which is not known: name "
                f"another checkpoint, or set {name} to false in its scheduler_config.json."
            )
    if stated.get("num_train_timesteps", STEPS) != STEPS:
        raise InputError(
            f"The checkpoint's scheduler has {quoted(stated['num_train_timesteps'])} timesteps, "
            f"and flows have {STEPS}: set num_train_timesteps to {STEPS} in its "
            "scheduler_config.json, or name another checkpoint."
        )
    try:
        check_number("shift", stated.get("shift", 1.0), above=0, optional=True)
        schedule: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(
            stated
        )
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(
            "The noise levels of the scheduler's configuration cannot be computed "
            f"({str(error)!r:.80}): correct its shift, shift_terminal, time_shift_type and its "
            "use_... switches."
        ) from error
    if schedule.config["use_dynamic_shifting"] and not has_mu:
        raise InputError(
            "The checkpoint's scheduler has use_dynamic_shifting, a shift by the resolution, which "
            "this family has not: name a checkpoint of the family, or set use_dynamic_shifting to "
            "false in its scheduler_config.json."
        )
    return schedule


def linear_levels(steps: int, precision: Linear = True) -> list[float]:
    """Return the levels of 1, 1 - 1/n, ..., 1/n, bit for bit those of a stock pipeline.

    Args:
        steps: Number n of sampling steps.
        precision: `float32` if torch computes them in that precision; NumPy in float64 otherwise.
    """
    if precision == "float32":
        levels: list[float] = torch.linspace(1.0, 1 / steps, steps).tolist()
        return levels
    return [float(level) for level in np.linspace(1.0, 1 / steps, steps)]


def _check_class(config: dict[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind is not None and kind not in FLOW_SCHEDULERS:
        raise InputError(
            f"The checkpoint's scheduler is a {kind!s:.80}, whose noise process is not that of a "
            f"rectified flow: name a checkpoint with a {min(FLOW_SCHEDULERS)}."
        )

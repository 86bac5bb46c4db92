"""Build the noise schedule of a scheduler configuration; refuse noise processes that are unknown.

Each scheduler class of diffusers reads the fields that it knows and drops the others, so that a
configuration of flow matching or of EDM gives a DDPM schedule without an error.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lit_prefopt.errors import InputError

DDPM_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
        *("DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete"),
        *("HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM"),
        *("SASolver", "TCD", "UniPCMultistep"),
    )
)
"""Scheduler classes of diffusers that sample the discrete noise process of DDPM."""

OTHER_PROCESSES = {
    "use_flow_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "sigma_data": (None,),
    "snr_shift_scale": (None, 1, 1.0),
    "shift": (None,),
}
"""Fields of noise processes other than DDPM's, with the values that leave it as it is."""

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
"""Fields of the noise levels, whose defaults differ between classes."""


def noise_schedule(
    config: dict[str, Any], prediction: str | None = None, zero_terminal_snr: bool | None = None
) -> DDPMScheduler:
    """Return the noise schedule of a scheduler configuration.

    Args:
        config: The configuration of any of diffusers' schedulers with DDPM's noise process.
        prediction: Prediction type that replaces the stated one.
        zero_terminal_snr: Whether the last noise level is pure noise, if it is not as stated.

    Raises:
        InputError: Another noise process, or noise levels that cannot be computed.
    """
    check_scheduler(config)
    stated = _class_defaults(config.get("_class_name")) | config
    if prediction is not None:
        stated["prediction_type"] = prediction
    if zero_terminal_snr is not None:
        stated["rescale_betas_zero_snr"] = zero_terminal_snr
    try:
        schedule: DDPMScheduler = DDPMScheduler.from_config(stated)
        levels: torch.Tensor = schedule.alphas_cumprod
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "The noise levels of the scheduler's configuration cannot be computed "
            f"({str(error)!r:.80}): correct its beta_schedule, beta_start, beta_end, trained_betas "
            "and num_train_timesteps."
        ) from error
    falling = (levels.diff() <= 0).all() and levels.min() >= 0 and levels.max() <= 1
    if len(levels) != schedule.config["num_train_timesteps"] or not falling:
        raise InputError(
            "The noise levels of the scheduler's configuration do not fall from 1 to 0 over "
            "num_train_timesteps: correct its beta_start, beta_end and trained_betas."
        )
    return schedule


def check_scheduler(config: dict[str, Any]) -> None:
    """Check that a scheduler configuration is of DDPM's noise process.

    Args:
        config: The configuration, as diffusers stores it.

    Raises:
        InputError: Its class or one of its fields is of another noise process.
    """
    kind = config.get("_class_name")
    if kind is not None and kind not in DDPM_SCHEDULERS:
        raise InputError(
            f"The checkpoint's scheduler is a {kind!s:.80}, whose noise process is not known: "
            "name a checkpoint with a scheduler of discrete diffusion (DDPM), or, if its noise is "
            'DDPM\'s, state `"_class_name": "DDIMScheduler"` in its scheduler_config.json.'
        )
    for name, usual in OTHER_PROCESSES.items():
        if config.get(name) not in usual:
            raise InputError(
                f"The checkpoint's scheduler has {name} {config[name]!r:.80}, so its noise "
                "process is not DDPM's: name a checkpoint of discrete diffusion, or, if its noise "
                f"is DDPM's, remove {name} from its scheduler_config.json."
            )


def restate_scheduler(scheduler: Any, changes: dict[str, Any]) -> Any:
    """Return a scheduler with other settings of its noise process.

    A class that has no zero terminal SNR, which would ignore it, becomes DDIM.

    Args:
        scheduler: A scheduler of diffusers.
        changes: Fields of its configuration.
    """
    kind = type(scheduler)
    if not set(changes) <= set(inspect.signature(kind.__init__).parameters):
        kind = DDIMScheduler
    return kind.from_config(scheduler.config, **changes)


def last_level(schedule: DDPMScheduler) -> float:
    """Return the share of the signal's variance that is left at the last noise level."""
    levels: torch.Tensor = schedule.alphas_cumprod
    return float(levels[-1])


def _class_defaults(kind: str | None) -> dict[str, Any]:
    """Return the default noise levels of a scheduler class."""
    if kind is None:
        return {}
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    # a class of which a package is missing is a placeholder without them
    return {name: parameters[name].default for name in SCHEDULE if name in parameters}

"""Convert a pipeline to a single file in the original layout, for A1111 and ComfyUI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component, Family
from lit_prefopt.processes.marks import mark_tensors
from lit_prefopt.weights.component_files import original_state


def single_file_state(pipeline: DiffusionPipeline, family: Family) -> dict[str, Tensor]:
    """Return all weights of a pipeline with their original keys.

    Args:
        pipeline: The pipeline.
        family: Its family.
    """
    state: dict[str, Tensor] = {}
    for name, component in family.components.items():
        net: nn.Module | None = getattr(pipeline, name)
        if net is None:
            continue
        state |= original_state(net, component)
        for parameter in component.identity:
            _check_identity(net.get_parameter(parameter), f"{name}.{parameter}")
    if family.noise == "ddpm":
        levels = pipeline.scheduler.config
        predicts_v = levels.prediction_type == "v_prediction"
        state |= mark_tensors(predicts_v, bool(levels.get("rescale_betas_zero_snr")))
    # the two names of T5's embedding are one tensor, which the format stores twice
    places = Counter(tensor.data_ptr() for tensor in state.values() if tensor.numel())
    return {
        name: (tensor.clone() if places[tensor.data_ptr()] > 1 else tensor).detach().contiguous()
        for name, tensor in state.items()
    }


def check_single_file(component: Component, config: Mapping[str, Any]) -> None:
    """Raise InputError for a denoiser that the original layout does not support.

    Args:
        component: The component of its family.
        config: Its configuration.
    """
    if component.guidance_width(config) is not None:
        raise InputError(
            f"This {component.name} has a guidance-scale embedding, which the original layout does "
            f"not support: export it to {component.name} or pipeline."
        )


def _check_identity(weight: Tensor, name: str) -> None:
    """Warn of a layer that diffusers takes for the identity when it reads a single file."""
    if not torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype)):
        rank_zero_warn(
            f"{name} is not the identity: the file contains it, but diffusers' `from_single_file` "
            "takes the identity in its place; use `--to pipeline` for diffusers."
        )

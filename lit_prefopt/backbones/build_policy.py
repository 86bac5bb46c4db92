"""Build the policy of a UNet: LoRA or full fine-tune, with its reference."""

from __future__ import annotations

import copy
from typing import Literal

from diffusers import UNet2DConditionModel

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.policy import Policy, freeze


def build_policy(unet: UNet2DConditionModel, lora: LoRA | None, reference: str) -> Policy:
    """Build the policy with its reference: a frozen copy, another UNet, no adapter, or none.

    Args:
        unet: The denoiser to be trained; a LoRA is added to it in place.
        lora: The adapter, if only one is trained.
        reference: `initial`, `none`, or hub name, folder or file of another UNet.
    """
    frozen: UNet2DConditionModel | Literal["adapter-off"] | None = None
    if reference not in ("initial", "none"):
        other = load_component(
            UNet2DConditionModel, reference, "unet", unet.dtype, config=lambda: dict(unet.config)
        )
        frozen = freeze(other)
    elif reference == "initial":
        frozen = "adapter-off" if lora else freeze(copy.deepcopy(unet))
    if lora is not None:
        lora.add_to(unet)
    return Policy(unet, frozen)

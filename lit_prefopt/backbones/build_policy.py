"""Build the policy of a denoiser: LoRA or full fine-tune, with its reference."""

from __future__ import annotations

import copy
from typing import Literal

from diffusers import ModelMixin

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.backbones.lora import ATTENTION, LoRA
from lit_prefopt.backbones.policy import Policy, freeze
from lit_prefopt.families.base import Family


def build_policy(
    net: ModelMixin,
    lora: LoRA | None,
    reference: str,
    family: Family,
    gradient_checkpointing: bool | Literal["auto"] = False,
) -> Policy:
    """Build the policy with its reference: a frozen copy, another network, no adapter, or none.

    Args:
        net: The denoiser to be trained; a LoRA is added to it in place.
        lora: The adapter, if only one is trained.
        reference: `initial`, `none`, or hub name, folder or file of another denoiser.
        family: The denoiser's family.
        gradient_checkpointing: Whether activations are recomputed in the backward pass; with
            `auto` they are until a run decides.
    """
    if gradient_checkpointing:
        net.enable_gradient_checkpointing()
    frozen: ModelMixin | Literal["adapter-off"] | None = None
    if reference not in ("initial", "none"):
        part = family.denoiser
        other = load_component(
            part.kind, reference, part.name, net.dtype, config=lambda: dict(net.config)
        )
        frozen = freeze(other)
    elif reference == "initial":
        frozen = "adapter-off" if lora else freeze(copy.deepcopy(net))
    unused = family.unused(net.config)
    if lora is not None:
        lora.add_to(net, family.lora_targets or ATTENTION, unused)
    for name in unused:
        net.get_submodule(name).requires_grad_(False)
    policy = Policy(net, frozen)
    policy.checkpoints_by_memory = gradient_checkpointing == "auto"
    return policy

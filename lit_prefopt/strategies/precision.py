"""Check `trainer.precision` against the weights' own precision, and keep batches unchanged."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision

from lit_prefopt.backbones.policy import Policy, trained
from lit_prefopt.errors import InputError
from lit_prefopt.strategies.full_state import FullStateStrategy

COMPUTES = {"16": torch.float16, "bf16": torch.bfloat16}
"""Dtype in which each of the Trainer's half precisions computes."""


def apply_precision(module: LightningModule) -> None:
    """Check that a module's weights fit `trainer.precision`; Lightning casts nothing afterwards.

    In mixed precision a separate reference is rounded as autocast would round it at every use.

    The backbone states the precision of its weights (`dtype`, `policy_dtype`), and `bf16-true` and
    `16-true` must agree with it. Lightning's own plugin for them would cast a LoRA, and the labels,
    weights and scores of each batch, and would create all new tensors of a step in 16 bits.

    Args:
        module: The module of a run, before it is moved to the devices.

    Raises:
        InputError: The weights and the precision exclude each other.
    """
    strategy, name = module.trainer.strategy, str(module.trainer.precision)
    bits, _, kind = name.partition("-")
    policies = [part for part in module.modules() if isinstance(part, Policy)]
    rounded = {policy.rounded for policy in policies} - {None}
    if rounded - ({COMPUTES.get(bits)} if kind == "mixed" else set()):
        raise InputError(
            f"The reference was rounded by an earlier run in mixed precision and cannot be used "
            f"in `--trainer.precision {name}`: build the backbone again."
        )
    if name == "32-true":
        return
    if bits not in COMPUTES or kind not in ("mixed", "true"):
        raise InputError(
            f"`--trainer.precision {name}` is not supported: choose 32-true, bf16-mixed, 16-mixed, "
            "bf16-true or 16-true."
        )
    _check(module, name, COMPUTES[bits], mixed=kind == "mixed")
    if kind == "true":
        plain = Precision()
        plain.precision = strategy.precision_plugin.precision
        strategy.precision_plugin = plain
    elif not isinstance(strategy, FullStateStrategy):  # those shard weights of one precision
        for policy in policies:
            policy.round_reference(COMPUTES[bits])


def _check(module: LightningModule, name: str, computes: torch.dtype, *, mixed: bool) -> None:
    accepted = {computes, torch.float32} if mixed else {computes}
    found = sorted(_dtypes(module) - accepted, key=str)
    if not found:
        return
    stated, wanted = (str(dtype).removeprefix("torch.") for dtype in (found[0], computes))
    full = " (`--backbone.policy_dtype bfloat16` in a full fine-tune)" * (wanted == "bfloat16")
    if mixed:
        raise InputError(
            f"`--trainer.precision {name}` computes in {wanted} and the weights are {stated}: set "
            f"`--backbone.dtype {wanted}`{full}, or compute in the weights' own precision "
            "(`--trainer.precision 32-true`)."
        )
    raise InputError(
        f"`--trainer.precision {name}` needs weights in {wanted} and they are {stated}: set "
        f"`--backbone.dtype {wanted}`{full}, or keep them in {stated} "
        f"(`--trainer.precision {'bf16-mixed' if stated == 'float32' else '32-true'}`)."
    )


def _dtypes(module: LightningModule) -> set[torch.dtype]:
    """Return the dtypes of all denoisers and trained weights, except a LoRA's, always float32.

    Without a denoiser's weights, as in a cache of latents, they are those of the text encoders.
    """
    policies = [part for part in module.modules() if isinstance(part, Policy)]
    named = [pair for policy in policies for pair in policy.named_parameters()]
    named += trained(module).items()
    if not named:
        named = [(key, p) for key, p in module.named_parameters() if ".vae." not in key]
    return {p.dtype for key, p in named if p.is_floating_point() and ".lora_" not in key}

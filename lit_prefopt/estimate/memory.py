"""Compute the memory of a training by part, and possible savings; computed, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_prefopt.backbones import trained
from lit_prefopt.backbones.quantization import KINDS, saved_bytes
from lit_prefopt.conditioning import Prompt
from lit_prefopt.estimate.step_cost import Context, bytes_of, checkpointing, step_cost
from lit_prefopt.learner import Learner
from lit_prefopt.optimizers import AdamW, AdamW8bit

GIB = 2**30
FITS = 0.9
"""Share of the device's memory that a step may use."""
LEAST = 0.01  # savings below this share of all bytes are not listed


class MemoryFootprint(NamedTuple):
    """Bytes of one rank by part, at the peak."""

    trained: int
    gradients: int
    states: int  # of the optimizer
    reference: int  # if it is a separate network
    frozen: int  # of the denoiser, below an adapter, and its buffers, such as a table of positions
    others: dict[str, int]  # frozen parts by name
    activations: int = 0

    def named(self) -> dict[str, int]:
        """Return the non-empty parts by name, in the order of the table."""
        parts = {
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer states": self.states,
            "reference copy": self.reference,
            "the denoiser's frozen weights": self.frozen,
            **self.others,
            "activations": self.activations,
        }
        return {name: size for name, size in parts.items() if size}

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.named().values())


def footprint(module: Learner, activations: int = 0) -> MemoryFootprint:
    """Compute the memory footprint of a method.

    Args:
        module: The method.
        activations: Bytes of activations, from `step_cost`.
    """
    policy, parameters = module.backbone.policy, [*trained(module).values()]
    own = {id(p) for p in parameters}
    below = bytes_of(policy.denoiser) - sum(
        _size(p) for p in policy.denoiser.parameters() if id(p) in own
    )
    weights = sum(_size(p) for p in parameters)
    children = {**dict(module.named_children()), **dict(module.backbone.named_children())}
    others = {
        name.replace("_", " "): bytes_of(child) - sum(_size(p) for p in trained(child).values())
        for name, child in children.items()
        if name not in ("backbone", "policy", "process", "held_out")
    }
    return MemoryFootprint(
        trained=weights,
        gradients=0 if module.optimizer.releases else weights,
        states=sum(module.optimizer.state_bytes(p) for p in parameters),
        reference=bytes_of(policy.frozen),
        frozen=below,
        others={name: size for name, size in others.items() if size},
        activations=activations,
    )


class MemorySaving(NamedTuple):
    """A change of the recipe, with the bytes that it saves."""

    size: int
    what: str
    how: str  # as command-line arguments


def savings(
    module: Learner, batch: Any = None, accumulated: int = 1, context: Context = nullcontext
) -> list[MemorySaving]:
    """Return changes that save memory, the largest saving first.

    Args:
        module: The method.
        batch: The current batch; without one, savings of activations are not computed.
        accumulated: Batches per optimizer step, over all ranks.
        context: Context of a step, such as autocast.
    """
    found = [*_of_weights(module)]
    if batch is not None:
        found += _of_activations(module, batch, accumulated, context)
    least = LEAST * footprint(module).total
    return sorted((s for s in found if s.size > least), reverse=True)


def _of_weights(module: Learner) -> Iterator[MemorySaving]:
    parts, policy, parameters = footprint(module), module.backbone.policy, trained(module).values()
    optimizer = module.optimizer
    if any(p.requires_grad for p in policy.denoiser.parameters()) and not policy.adapter:
        halved = parts.trained // 2  # the network below a LoRA may be in 16 bits
        size = parts.gradients + parts.states + parts.reference + halved
        yield MemorySaving(
            size, "a LoRA, with its base network as reference", "--backbone.lora.rank 16"
        )
    if type(optimizer) is AdamW:
        eight_bit = AdamW8bit(optimizer.lr)
        size = parts.states - sum(eight_bit.state_bytes(p) for p in parameters)
        yield MemorySaving(size, "8-bit moments", "--model.optimizer AdamW8bit")
        if not optimizer.fused and module.device.type == "cuda":
            yield MemorySaving(
                parts.trained,
                "an optimizer step without a copy of all weights",
                "--model.optimizer.fused true",
            )
    if policy.adapter:
        for kind, name in KINDS.items():
            size = saved_bytes(policy.denoiser, kind)
            how = f"--backbone.quantization {kind}"
            yield MemorySaving(size, f"weights below the LoRA in {name}", how)
    frozen = sum(
        _size(p) // 2 for p in _frozen(module) if p.dtype == torch.float32 and p.numel() > 1
    )
    yield MemorySaving(frozen, "frozen parts in bfloat16", "--backbone.dtype bfloat16")
    if not getattr(module, "needs_reference", False):
        yield MemorySaving(parts.reference, "no reference network", "--backbone.reference none")
    elif getattr(module, "takes_reference_errors", False):
        yield MemorySaving(
            parts.reference,
            "the reference's errors from a cache, in place of a reference network",
            "--backbone.reference none --data CachedPairs --data.reference FOLDER",
        )


def _frozen(module: Learner) -> list[nn.Parameter]:
    """Return the frozen parameters, except a reference, which has the policy's precision."""
    policy = module.backbone.policy
    kept = {id(p) for p in policy.frozen.parameters()} if policy.frozen is not None else set()
    frozen = (p for p in module.parameters() if not p.requires_grad)
    return [p for p in frozen if id(p) not in kept]


def _of_activations(
    module: Learner, batch: Any, accumulated: int, context: Context
) -> Iterator[MemorySaving]:
    denoiser: Any = module.backbone.policy.denoiser
    now = step_cost(module, batch, context).activations
    if not denoiser.is_gradient_checkpointing:
        with checkpointing(module, True):
            size = now - step_cost(module, batch, context).activations
        how = "--backbone.gradient_checkpointing true"
        yield MemorySaving(size, "gradient checkpointing", how)
    rows = len(batch.seeds)
    if rows > 1:
        size = now - step_cost(module, first_row(batch), context).activations
        how = f"--data.batch_size 1 --batch.pairs {accumulated * rows}"
        yield MemorySaving(size, "one pair per batch, with the same pairs per step", how)


def first_row(batch: Any) -> Any:
    """Return the first row of a batch."""
    return type(batch)(*(_first(field) for field in batch))


def _first(field: Any) -> Any:
    if isinstance(field, tuple) and hasattr(field, "_fields"):
        return first_row(field)
    if isinstance(field, Prompt):
        return field.rows(slice(1)).map(torch.clone)
    if isinstance(field, torch.Tensor):
        return field[:1].clone()  # not a view of all rows
    return field[:1] if isinstance(field, list) else field


def advice(saved: list[MemorySaving]) -> str:
    """Format the savings, one per line."""
    return "\n".join(f"  {s.size / GIB:6.2f} GiB  {s.what}: `{s.how}`" for s in saved)


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()

"""Find the cheapest options with which a training step fits a memory; computed, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode

from lit_prefopt.backbones import trained
from lit_prefopt.backbones.quantization import KINDS, Quantization, largest_layer, saved_bytes
from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.estimate.memory import MemoryFootprint, first_row, footprint
from lit_prefopt.estimate.step_cost import (
    Context,
    StepCost,
    checkpointing,
    encoded_pairs,
    step_cost,
)
from lit_prefopt.optimizers import AdamW, AdamW8bit

ROUNDING = {None: 0, "int8": 1, "nf4": 2}
"""How much a quantization changes the weights below a LoRA."""


class Switches(NamedTuple):
    """Options that save memory."""

    checkpointing: bool = False  # activations are recomputed
    one_pair: bool = False  # a batch has one pair, a step as many as before
    cached: bool = False  # latents and prompts come from a cache, encoders are not loaded
    errors: bool = False  # the reference's errors come from a cache, it is not loaded
    eight_bit: bool = False  # moments of the optimizer in 8 bits
    bf16_weights: bool = False  # all weights are trained in bfloat16, with stochastic rounding
    quantization: Quantization | None = None  # of the weights below a LoRA

    @property
    def cost(self) -> tuple[int, ...]:
        """Order of preference: first what changes no loss, then the shorter step, then fewer."""
        changes = self.errors + self.eight_bit + 2 * self.bf16_weights
        others = self.cached + self.errors
        return changes + ROUNDING[self.quantization], self.checkpointing, self.one_pair, others

    @property
    def names(self) -> str:
        """Return the options in words."""
        named = {
            "checkpointing": self.checkpointing,
            "one pair per batch": self.one_pair,
            "cached encodings": self.cached,
            "cached reference errors": self.errors,
            "8-bit optimizer": self.eight_bit,
            "bfloat16 weights": self.bf16_weights,
            f"base in {self.quantization}": self.quantization is not None,
        }
        return ", ".join(name for name, on in named.items() if on) or "none"


class Trial(NamedTuple):
    """A set of options with what a step needs."""

    switches: Switches
    parts: MemoryFootprint
    pair_flops: int  # of a step, per pair; 0 if the weights alone do not fit

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.parts.total


class SwitchSearch:
    """Tries options that save memory on one method and one batch.

    Args:
        module: The method, built without quantization and with its encoders, if the recipe has
            them; neither it nor its weights change.
        batch: A batch of its data module.
        context: Context of a step, such as autocast.
        bf16: Whether the run may have weights in bfloat16.
        base: Quantization of the recipe, which all sets of options then have.
    """

    def __init__(
        self,
        module: Any,
        batch: Any,
        context: Context = nullcontext,
        *,
        bf16: bool = True,
        base: Quantization | None = None,
    ) -> None:
        self.module, self.batch, self.context = module, batch, context
        self.bf16, self.base = bf16, base
        self.policy = module.backbone.policy
        self._costs: dict[tuple[Any, ...], StepCost] = {}
        self._encoded: LatentPairs | None = None
        self._weights: dict[bool, MemoryFootprint] = {}

    def offers(self) -> list[Switches]:
        """Return all sets of options that the recipe can have, the preferred ones first."""
        both, off = (False, True), (False,)
        lora = self.policy.adapter
        encoders = self.module.backbone.has_encoders
        errors = (
            self.policy.frozen is not None
            and self.module.needs_reference
            and self.module.takes_reference_errors
        )
        float32 = {p.dtype for p in trained(self.policy).values()} == {torch.float32}
        eight_bit = type(self.module.optimizer) is AdamW
        full = not lora and self.bf16 and float32 and eight_bit
        found = product(
            both,
            both if len(self.batch.seeds) > 1 else off,
            both if encoders else off,
            both if errors else off,
            both if eight_bit else off,
            both if full else off,
            (None, *KINDS) if lora and self.base is None else (self.base,),
        )
        offered = (Switches(*one) for one in found)
        # errors are read from a cache of encodings, and bfloat16 needs an optimizer that rounds
        return sorted(
            (
                one
                for one in offered
                if (one.cached or not encoders or not one.errors)
                and (one.eight_bit or not one.bf16_weights)
            ),
            key=lambda one: one.cost,
        )

    def fit(self, limit: int) -> list[Trial]:
        """Try sets of options in the order of their cost, up to the first that fits.

        If none does, the last trial is the one that needs the least.

        Args:
            limit: Bytes that a step may use.
        """
        trials = []
        offers = self.offers()
        for switches in offers:
            weights = self.weights(switches)
            trial = Trial(switches, weights, 0) if weights.total > limit else self.trial(switches)
            trials.append(trial)
            if trial.total <= limit:
                return trials
        least = min(offers, key=lambda one: (self.weights(one).total, [not on for on in one[:3]]))
        return [*trials, self.trial(least)]

    def trial(self, switches: Switches) -> Trial:
        """Compute what a step needs with some options."""
        cost = self._cost(switches)
        rows = 1 if switches.one_pair else len(self.batch.seeds)
        layer = largest_layer(self.policy.denoiser) if switches.quantization else 0
        parts = self.weights(switches)._replace(activations=cost.activations + layer)
        return Trial(switches, parts, cost.flops // rows)

    def weights(self, switches: Switches) -> MemoryFootprint:
        """Compute the bytes by part with some options, activations not counted."""
        if switches.bf16_weights not in self._weights:
            with self._weights_in(switches):
                self._weights[switches.bf16_weights] = footprint(self.module)
        parts, optimizer = self._weights[switches.bf16_weights], self.module.optimizer
        if switches.cached:
            left_out = {name.replace("_", " ") for name in self.module.backbone.encoders}
            others = {name: size for name, size in parts.others.items() if name not in left_out}
            parts = parts._replace(others=others)
        if switches.errors:
            parts = parts._replace(reference=0)
        if switches.eight_bit:
            moments = AdamW8bit(optimizer.lr)
            states = sum(moments.state_bytes(p) for p in trained(self.module).values())
            parts = parts._replace(states=states)
        if switches.quantization is not None:
            saved = saved_bytes(self.policy.denoiser, switches.quantization)
            parts = parts._replace(frozen=parts.frozen - saved)
        return parts

    def encoded(self) -> LatentPairs:
        """Return the shapes of the batch as from a cache."""
        if not isinstance(self.batch, ImagePairs):
            return self.batch
        if self._encoded is None:
            self._encoded = encoded_pairs(self.module, self.batch)
        return self._encoded

    def _cost(self, switches: Switches) -> StepCost:
        key = (*switches[:4], switches.bf16_weights)
        if key not in self._costs:
            batch = self.encoded() if switches.cached else self.batch
            if switches.errors:
                rows, sides = batch.mean.shape[:2]
                batch = batch._replace(reference_error=torch.zeros(rows, 1, sides))
            if switches.one_pair:
                batch = first_row(batch)
            with self._weights_in(switches), checkpointing(self.module, switches.checkpointing):
                self._costs[key] = step_cost(self.module, batch, self.context)
        return self._costs[key]

    @contextmanager
    def _weights_in(self, switches: Switches) -> Iterator[None]:
        """Convert the denoiser and its copy to bfloat16 inside the block, if so switched."""
        if not switches.bf16_weights:
            yield
            return
        backbone = self.module.backbone
        modules = [module for net in self.policy.networks for module in net.modules()]
        weights = [p for module in modules for p in module.parameters(recurse=False)]
        buffers = [(module._buffers, {**module._buffers}) for module in modules]
        before, dtype = [p.data for p in weights], backbone.dtype
        mode = detect_fake_mode(weights) or nullcontext()
        with mode:
            for p in weights:
                p.data = p.data.to(torch.bfloat16)
            for own, kept in buffers:
                own.update({n: x if x is None else x.to(torch.bfloat16) for n, x in kept.items()})
        backbone.dtype = torch.bfloat16
        try:
            yield
        finally:
            backbone.dtype = dtype
            for own, kept in buffers:
                own.update(kept)
            with mode:
                for p, data in zip(weights, before, strict=True):
                    p.data = data

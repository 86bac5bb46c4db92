"""The trained network and its reference: a frozen copy, or itself without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from lit_prefopt.backbones.adapter_layers import AdapterLayers
from lit_prefopt.errors import InputError
from lit_prefopt.utils.fingerprint import fingerprint

CASTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast casts to half precision at every use."""


class Policy(nn.Module):
    """The trained denoiser together with its reference.

    The reference is one of: the same network with its adapter disabled (no second copy), a separate
    frozen network, or none. Both compute in the same precision, so that their errors are equal to
    the last bit as long as their weights are.

    Args:
        denoiser: The network to train, adapter included.
        reference: `adapter-off` for the network without its adapter, a separate frozen network, or
            None.
    """

    def __init__(
        self, denoiser: ModelMixin, reference: ModelMixin | Literal["adapter-off"] | None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.set_reference(reference)
        self.negative: ModelMixin | None = None
        """Negative model, which replaces the prediction without prompt in guidance."""
        self._reference_active = self._negative_active = False
        self._adapters: AdapterLayers | None = None
        self._reference_fingerprint: str | None = None
        self.rounded: torch.dtype | None = None
        self.checkpoints_by_memory = False  # gradient checkpointing is decided by a run

    @property
    def net(self) -> ModelMixin:
        """The active network: the policy, inside `as_reference` the reference, or the negative."""
        if self._negative_active:
            return self.negative
        return self.frozen if self._reference_active else self.denoiser

    @property
    def networks(self) -> list[ModelMixin]:
        """The trained network, and the reference if it is a separate one."""
        return [net for net in (self.denoiser, self.frozen) if net is not None]

    @property
    def adapter(self) -> bool:
        """Whether only an adapter is trained."""
        return hasattr(self.denoiser, "peft_config")

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference."""
        return self._adapter_off or self.frozen is not None

    @property
    def reference_weights(self) -> dict[str, Tensor]:
        """Weights of the reference or, without one, those that training starts from.

        Neither they nor their names contain an adapter.
        """
        net = self.denoiser if self.frozen is None else self.frozen
        state: dict[str, Tensor] = net.state_dict()
        return {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}

    def reference_fingerprint(self) -> str:
        """Return the fingerprint of the reference's weights in their own precision."""
        return self._reference_fingerprint or fingerprint(self.reference_weights)

    def round_reference(self, dtype: torch.dtype) -> None:
        """Store weights of a separate reference as autocast rounds them at every use.

        Under autocast to `dtype` its predictions stay the same to the last bit, and it takes half
        of the memory; without autocast it cannot be used any more. `rounded` is then `dtype`.

        Args:
            dtype: Half precision of the run.
        """
        if self.frozen is not None and self.rounded is None and _castable(self.frozen):
            self._reference_fingerprint, self.rounded = self.reference_fingerprint(), dtype
            round_weights(self.frozen, dtype)

    def set_reference(self, reference: ModelMixin | Literal["adapter-off"] | None) -> None:
        """Set another reference; for the argument see the class."""
        self.frozen = reference if isinstance(reference, nn.Module) else None
        self._adapter_off = reference == "adapter-off"

    def drop_reference(self) -> None:
        """Remove the reference."""
        self.set_reference(None)
        self._reference_fingerprint = self.rounded = None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Activate the reference inside the block."""
        if not self.has_reference:
            raise InputError(
                "This method needs a reference, and the recipe has none: set "
                "`--backbone.reference initial`."
            )
        with self._without_adapter() if self._adapter_off else self._activate_reference():
            yield

    @contextmanager
    def as_negative(self) -> Iterator[None]:
        """Activate the negative model inside the block."""
        self._negative_active = True
        try:
            yield
        finally:
            self._negative_active = False

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        if self._adapters is None or self._adapters.net is not self.denoiser:
            self._adapters = AdapterLayers(self.denoiser)
        with self._adapters.disabled():
            yield

    @contextmanager
    def _activate_reference(self) -> Iterator[None]:
        self._reference_active = True
        try:
            yield
        finally:
            self._reference_active = False

    def train(self, mode: bool = True) -> Policy:
        """Set the policy's mode; the reference stays in evaluation mode."""
        super().train(mode)
        for net in (self.frozen, self.negative):
            if net is not None:
                net.eval()
        return self


def round_weights(net: nn.Module | None, dtype: torch.dtype) -> None:
    """Store the float32 weights that autocast would cast to a half precision in that precision."""
    for weight in _castable(net) if net is not None else ():
        weight.data = weight.data.to(dtype)


def _castable(net: nn.Module) -> list[nn.Parameter]:
    layers = [layer for layer in net.modules() if isinstance(layer, CASTED)]
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
    return [weight for weight in weights if weight.dtype == torch.float32]


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def freeze(net: nn.Module) -> nn.Module:
    """Freeze a network, and return it in evaluation mode."""
    return net.requires_grad_(False).eval()

"""The network that holds the policy back, whatever it is made of; no method asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from diffusers import ModelMixin
from torch import Tensor, nn

from lit_prefopt.errors import InputError


class Policy(nn.Module):
    """The trained denoiser together with its reference.

    The reference is one of: the same network with its adapter off (no second copy), a frozen
    network of its own, or nothing. Both speak through the same dtype path, so that their errors
    are equal to the last bit as long as their weights are.

    Args:
        denoiser: The network to train, adapter included.
        reference: `adapter-off` for the network without its adapter, a frozen network of its own,
            or None.
    """

    def __init__(
        self, denoiser: ModelMixin, reference: ModelMixin | Literal["adapter-off"] | None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.frozen = reference if isinstance(reference, nn.Module) else None
        self._adapter_off = reference == "adapter-off"
        self._reference_active = False

    @property
    def net(self) -> ModelMixin:
        """The network that speaks now."""
        return self.frozen if self._reference_active else self.denoiser

    @property
    def networks(self) -> list[ModelMixin]:
        """The trained network, and the reference's where it has one of its own."""
        return [net for net in (self.denoiser, self.frozen) if net is not None]

    @property
    def adapter(self) -> bool:
        """Whether only an adapter is trained."""
        return hasattr(self.denoiser, "peft_config")

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to hold the policy back."""
        return self._adapter_off or self.frozen is not None

    @property
    def reference_weights(self) -> dict[str, Tensor]:
        """Weights of the reference or, where there is none, of what training starts from.

        An adapter is no part of them, nor of their names.
        """
        net = self.denoiser if self.frozen is None else self.frozen
        state: dict[str, Tensor] = net.state_dict()
        return {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}

    def drop_reference(self) -> None:
        """Let nothing hold the policy back."""
        self.frozen, self._adapter_off = None, False

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Let the reference speak inside the block."""
        if not self.has_reference:
            raise InputError(
                "This needs a reference, and the recipe says there is none: set "
                "`--backbone.reference initial`."
            )
        with self._without_adapter() if self._adapter_off else self._activate_reference():
            yield

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @contextmanager
    def _activate_reference(self) -> Iterator[None]:
        self._reference_active = True
        try:
            yield
        finally:
            self._reference_active = False

    def train(self, mode: bool = True) -> Policy:
        """Set the policy's mode; the reference stays in evaluation."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def freeze(net: nn.Module) -> nn.Module:
    """Return the network, never to be trained."""
    return net.requires_grad_(False).eval()

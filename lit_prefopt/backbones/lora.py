"""Low-rank adapters (LoRA, arXiv 2106.09685) on a denoiser, through peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from lightning.pytorch.utilities import rank_zero_warn
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lit_prefopt.backbones.adapter_layers import KeepInputs
from lit_prefopt.backbones.policy import trained
from lit_prefopt.errors import InputError, check_number

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of a UNet's attention, by the end of their names."""


@dataclass
class LoRA:
    """A low-rank adapter (LoRA), the only trained weights, in float32.

    Args:
        rank: Rank of the update.
        alpha: The update is multiplied by alpha / rank, so that 0 trains nothing; alpha is the rank
            if not given.
        targets: Layers that get an adapter, by the end of their name; if not given, the
            projections of the denoiser's attention (`to_q`, `to_k`, `to_v`, `to_out.0`; of a joint
            attention also those of the text).
        dropout: Dropout probability of the adapter's inputs in training.
    """

    rank: int
    alpha: float | None = None
    targets: list[str] | None = None
    dropout: float = 0.0

    def add_to(
        self,
        denoiser: ModelMixin,
        defaults: Sequence[str] = ATTENTION,
        unused: Sequence[str] = (),
    ) -> None:
        """Freeze the network and add the adapter, which is the identity until it is trained.

        Args:
            denoiser: The network.
            defaults: Its layers that get an adapter if no targets are given.
            unused: Names of its modules whose layers get none in any case.
        """
        self._check_numbers()
        targets = list(defaults if self.targets is None else self.targets)
        if not targets:
            raise InputError(
                "The LoRA has no targets: name layers as `--backbone.lora.targets`, or leave it "
                "out for the attention's projections."
            )
        _check_targets(targets, denoiser)
        targets = [name for target in targets for name in _layers(target, denoiser)]
        left_out = [layer for name in unused for layer in _layers_in(denoiser, name)]
        denoiser.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=targets,
            exclude_modules=left_out or None,
            lora_dropout=self.dropout,
            init_lora_weights="gaussian",
        )
        denoiser.add_adapter(config)
        if left_out:  # saved as it was done, since peft warns of other targets at loading
            adapted = [
                name for name, x in denoiser.named_modules() if isinstance(x, BaseTunerLayer)
            ]
            config.target_modules, config.exclude_modules = adapted, None
        for parameter in trained(denoiser).values():
            parameter.data = parameter.data.to(torch.float32)
        denoiser.register_forward_pre_hook(KeepInputs(denoiser))

    def _check_numbers(self) -> None:
        """Check the numbers; warn of those with which the adapter cannot learn."""
        check_number("lora.rank", self.rank, 1)
        check_number("lora.alpha", self.alpha, optional=True)
        check_number("lora.dropout", self.dropout, 0, 1)
        if self.alpha == 0 or self.dropout == 1:
            name, cure = ("alpha", self.rank) if self.alpha == 0 else ("dropout", 0.0)
            rank_zero_warn(
                f"The LoRA cannot learn with {name} {getattr(self, name)}: its update is always "
                f"zero; set `--backbone.lora.{name} {cure}`."
            )


def _check_targets(targets: list[str], denoiser: ModelMixin) -> None:
    """Check that targets match layers: an error if none does, and a warning if some do not."""
    unknown = [one for one in targets if not _matches(one, denoiser)]
    if not unknown:
        return
    named = ", ".join(repr(one[:40]) for one in unknown[:5])
    kinds = (nn.Linear, nn.Conv2d)
    layers = [name for name, layer in denoiser.named_modules() if isinstance(layer, kinds)]
    message = (
        f"{len(unknown)} of the LoRA's {len(targets)} targets match no layer of "
        f"{type(denoiser).__name__} ({named}); its layers' names end in {_ends(layers)}"
    )
    if len(unknown) == len(targets):
        raise InputError(f"{message}: give such names as `--backbone.lora.targets`.")
    rank_zero_warn(f"{message}; only the other targets are trained.")


def _matches(target: str, net: nn.Module) -> bool:
    """Whether a target is a layer's name or the end of one, as peft defines it."""
    return any(name == target or name.endswith(f".{target}") for name, _ in net.named_modules())


def _layers(target: str, net: nn.Module) -> list[str]:
    """Return a target, or the layers that it matches if it matches lists of layers as well.

    peft refuses lists: FLUX.2's `attn.to_out` is a layer in single blocks and a list in double
    ones.
    """
    found = {
        name: isinstance(layer, (nn.Linear, nn.Conv2d))
        for name, layer in net.named_modules()
        if name == target or name.endswith(f".{target}")
    }
    layers = [name for name, is_layer in found.items() if is_layer]
    return layers if layers and len(layers) < len(found) else [target]


def _layers_in(net: nn.Module, name: str) -> list[str]:
    """Return the names of a module and of all modules inside."""
    return [one for one, _ in net.named_modules() if one == name or one.startswith(f"{name}.")]


def _ends(layers: list[str]) -> str:
    """Return the commonest last parts of layers' names, of lists of layers the last two."""
    parts = [name.split(".") for name in layers]
    ends = Counter(".".join(p[-2:] if p[-1].isdigit() else p[-1:]) for p in parts)
    return ", ".join(end for end, _ in ends.most_common(12))

"""Low-rank adapters (LoRA, arXiv 2106.09685) on a denoiser, through peft."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from peft import LoraConfig

from lit_prefopt.backbones.policy import trained


@dataclass
class LoRA:
    """A low-rank adapter (LoRA), the only trained weights, in float32.

    Args:
        rank: Rank of the update.
        alpha: The update is multiplied by alpha / rank; alpha is the rank if not given.
        targets: Layers that get an adapter, by the end of their name.
        dropout: Dropout probability of the adapter's inputs in training.
    """

    rank: int
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0

    def add_to(self, denoiser: ModelMixin) -> None:
        """Freeze the network and add the adapter, which is the identity until it is trained."""
        denoiser.requires_grad_(False)
        denoiser.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=self.rank if self.alpha is None else self.alpha,
                target_modules=list(self.targets),
                lora_dropout=self.dropout,
                init_lora_weights="gaussian",
            )
        )
        for parameter in trained(denoiser).values():
            parameter.data = parameter.data.to(torch.float32)

"""Load the denoiser that training starts from, once or again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.single_file_components import open_components
from lit_prefopt.families.base import Family
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora


def load_denoiser(parts: Components, source: str | None, dtype: torch.dtype) -> Any:
    """Load a denoiser: that of a pipeline, or another one.

    Args:
        parts: The pipeline's components.
        source: Hub name, folder or file of another denoiser.
        dtype: Precision of its weights.
    """
    if source is None:
        return parts.denoiser(dtype)
    part = parts.family.denoiser
    return load_component(part.kind, source, part.name, dtype, config=parts.denoiser_config)


class StartWeights(NamedTuple):
    """Where the denoiser that training starts from was loaded from; arguments of the backbone."""

    family: Family
    pretrained: str
    denoiser: str | None
    dtype: torch.dtype
    start_lora: str | None
    variant: str | None
    config: str | None
    channels_last: bool

    @property
    def can_be_loaded(self) -> bool:
        """Whether the weights come from files: those of a .json configuration are random."""
        return self.denoiser is None or not self.denoiser.endswith(".json")

    def load(self) -> Any:
        """Load the denoiser again, frozen, with the LoRA that training starts from."""
        parts = open_components(
            self.family,
            self.pretrained,
            [],
            variant=self.variant,
            config=self.config,
            vae=None,
        )
        net = load_denoiser(parts, self.denoiser, self.dtype)
        if self.start_lora is not None:
            merge_lora(self.family, net, {}, read_lora(self.start_lora).denoiser_alone())
        apply_memory_format_and_compile([net], channels_last=self.channels_last, compiled=False)
        return freeze(net)

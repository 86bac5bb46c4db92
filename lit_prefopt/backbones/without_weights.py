"""A denoiser of which only the configuration is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_prefopt.errors import InputError


class WithoutWeights(nn.Module):
    """A denoiser without weights, for a run that encodes images and prompts alone.

    Args:
        kind: Class of the denoiser in diffusers.
        config: Its configuration.
    """

    def __init__(self, kind: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = full_config(kind, config)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise InputError: there is nothing to compute with."""
        raise InputError(
            "The denoiser's weights are not loaded: set `--backbone.denoiser_weights true`."
        )


def full_config(kind: Any, config: dict[str, Any]) -> Any:
    """Return a configuration with the defaults of its diffusers class, without weights."""
    with torch.device("meta"):
        return kind.from_config(config).config

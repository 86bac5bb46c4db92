"""Align text-to-image diffusion models with human preferences."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from lit_prefopt.errors import InputError

if TYPE_CHECKING:
    from lit_prefopt.backbones import Backbone
    from lit_prefopt.batches import LogRatios, Pairs
    from lit_prefopt.judges import Judge
    from lit_prefopt.module import PreferenceDiffusionModule
    from lit_prefopt.on_policy import OnPolicyModule
    from lit_prefopt.runs.load import load

    __version__: str

__all__ = [
    "Backbone",
    "InputError",
    "Judge",
    "LogRatios",
    "OnPolicyModule",
    "Pairs",
    "PreferenceDiffusionModule",
    "__version__",
    "load",
]

LAZY = {
    "Backbone": "backbones",
    "Judge": "judges",
    "LogRatios": "batches",
    "OnPolicyModule": "on_policy",
    "Pairs": "batches",
    "PreferenceDiffusionModule": "module",
    "load": "runs.load",
}
"""Modules of the names that are imported on first use, since they import torch."""


def __getattr__(name: str) -> Any:
    """Return a name of `LAZY`, or the version of the installed package."""
    if name == "__version__":
        return importlib.metadata.version("lit-prefopt")
    if name in LAZY:
        return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

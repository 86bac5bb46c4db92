"""Align text-to-image diffusion models with human preferences."""

from typing import TYPE_CHECKING

from lit_prefopt.errors import InputError
from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.backbones.base import Backbone
    from lit_prefopt.batches import LogRatios, Pairs
    from lit_prefopt.judges.judge import Judge
    from lit_prefopt.module import PreferenceDiffusionModule
    from lit_prefopt.on_policy import OnPolicyModule
    from lit_prefopt.runs.load import load

__version__ = "0.1.0"
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

__getattr__, __dir__ = lazy_names(__name__)

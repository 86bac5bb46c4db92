"""Generators that `predict` runs: sampled pairs, cached latents, reference errors."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.generate.change_mask import ChangeMask
    from lit_prefopt.generate.corruptions import Corruption, MisspeltText, WordSwap
    from lit_prefopt.generate.diptych import DiptychGenerator
    from lit_prefopt.generate.edges import EdgeControl
    from lit_prefopt.generate.filters import (
        AttributeHolds,
        CallableFilter,
        Filter,
        LocalChange,
        MinimumChange,
        TextHolds,
    )
    from lit_prefopt.generate.generator import Generator
    from lit_prefopt.generate.latent_cache import LatentCache
    from lit_prefopt.generate.ranked import RankedSamples
    from lit_prefopt.generate.reference_errors import ReferenceErrors
    from lit_prefopt.generate.self_play import SelfPlay

__all__ = [
    "CallableFilter",
    "MinimumChange",
    "AttributeHolds",
    "ChangeMask",
    "Corruption",
    "DiptychGenerator",
    "EdgeControl",
    "Filter",
    "Generator",
    "LatentCache",
    "MisspeltText",
    "WordSwap",
    "RankedSamples",
    "ReferenceErrors",
    "SelfPlay",
    "LocalChange",
    "TextHolds",
]

__getattr__, __dir__ = lazy_names(__name__)

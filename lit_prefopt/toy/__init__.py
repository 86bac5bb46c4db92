"""The toy world, for tests and demos: scenes, exact judge, models and their training."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.toy.backbone import ToyConsistency, ToyDiffusion, ToyFlow
    from lit_prefopt.toy.clip import ToyCLIPTraining
    from lit_prefopt.toy.diptychs import ToyAttributes, ToyDiptychWeb
    from lit_prefopt.toy.judge import ToyJudge
    from lit_prefopt.toy.pairs import (
        ToyCollections,
        ToyPairGroups,
        ToyPairs,
        ToyPrompts,
        ToySampleGroups,
        ToyStages,
    )
    from lit_prefopt.toy.vae import ToyVAETraining
    from lit_prefopt.toy.web import ToyWeb

__all__ = [
    "ToyAttributes",
    "ToyCLIPTraining",
    "ToyCollections",
    "ToyConsistency",
    "ToyDiffusion",
    "ToyDiptychWeb",
    "ToyFlow",
    "ToyJudge",
    "ToyPairGroups",
    "ToyPairs",
    "ToyPrompts",
    "ToySampleGroups",
    "ToyStages",
    "ToyVAETraining",
    "ToyWeb",
]

__getattr__, __dir__ = lazy_names(__name__)

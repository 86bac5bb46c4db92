"""Lightning data modules: stored pairs, cached pairs, curricula, roll-outs, generation."""

from lit_prefopt.datamodules.cached import CachedPairs
from lit_prefopt.datamodules.curriculum import CurriculumPairs
from lit_prefopt.datamodules.generation import CachedGroups, PairGroups, PromptGroups, SampleGroups
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.datamodules.rollouts import PromptCollections

__all__ = [
    "CachedGroups",
    "CachedPairs",
    "CurriculumPairs",
    "PairGroups",
    "PairShards",
    "PromptCollections",
    "PromptGroups",
    "SampleGroups",
]

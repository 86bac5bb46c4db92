"""Callbacks: checkpoints, evaluation, sample grids, guards, export."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.callbacks.averaging import PolicyAveraging
    from lit_prefopt.callbacks.budget import Budget
    from lit_prefopt.callbacks.checkpoints import Checkpoints
    from lit_prefopt.callbacks.evaluation import Evaluation
    from lit_prefopt.callbacks.export_weights import ExportWeights
    from lit_prefopt.callbacks.guard import Guard
    from lit_prefopt.callbacks.interrupts import Interrupts
    from lit_prefopt.callbacks.out_of_memory import OutOfMemory
    from lit_prefopt.callbacks.reward_curve import RewardCurve
    from lit_prefopt.callbacks.sample_grid import SampleGrid

__all__ = [
    "Budget",
    "Checkpoints",
    "Evaluation",
    "ExportWeights",
    "Guard",
    "Interrupts",
    "OutOfMemory",
    "PolicyAveraging",
    "RewardCurve",
    "SampleGrid",
]

__getattr__, __dir__ = lazy_names(__name__)

"""Optimizers with their learning-rate schedules, as a recipe's `model.optimizer` names them."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.optimizers.adafactor import Adafactor
    from lit_prefopt.optimizers.adamw import AdamW
    from lit_prefopt.optimizers.config import OptimizerConfig
    from lit_prefopt.optimizers.eight_bit import AdamW8bit, Lion8bit

__all__ = ["Adafactor", "AdamW", "AdamW8bit", "Lion8bit", "OptimizerConfig"]

__getattr__, __dir__ = lazy_names(__name__)

"""Anything that scores."""

from lit_prefopt.judges.clip import CLIPJudge, PickScore
from lit_prefopt.judges.judge import Judge
from lit_prefopt.judges.step_aware import StepAware
from lit_prefopt.judges.step_aware_training import StepAwarePreference

__all__ = ["CLIPJudge", "Judge", "PickScore", "StepAware", "StepAwarePreference"]

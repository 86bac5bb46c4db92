"""Anything that scores."""

from lit_prefopt.judges.clip import CLIPJudge, PickScore
from lit_prefopt.judges.judge import Judge
from lit_prefopt.judges.step_aware import StepAware

__all__ = ["CLIPJudge", "Judge", "PickScore", "StepAware"]

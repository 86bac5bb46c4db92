"""Judges: reward models and other scorers of images."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.judges.aesthetic import Aesthetic
    from lit_prefopt.judges.clip import CLIPJudge, CLIPScore, PickScore
    from lit_prefopt.judges.endpoint import Endpoint
    from lit_prefopt.judges.hps import HPSv2
    from lit_prefopt.judges.image_reward import ImageReward
    from lit_prefopt.judges.judge import Judge
    from lit_prefopt.judges.metric import JudgeMetric
    from lit_prefopt.judges.mixture import CalibratedJudges, WeightedJudges
    from lit_prefopt.judges.step_aware import StepAware
    from lit_prefopt.judges.step_aware_training import StepAwarePreference
    from lit_prefopt.judges.vision_language import VisionLanguage

__all__ = [
    "Aesthetic",
    "CLIPJudge",
    "CLIPScore",
    "CalibratedJudges",
    "Endpoint",
    "HPSv2",
    "ImageReward",
    "Judge",
    "JudgeMetric",
    "PickScore",
    "StepAware",
    "StepAwarePreference",
    "VisionLanguage",
    "WeightedJudges",
]

__getattr__, __dir__ = lazy_names(__name__)

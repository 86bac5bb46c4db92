"""The embedded default: a world of scenes, its exact judge, and its models' trainings."""

from lit_prefopt.toy.clip import ToyCLIPTraining
from lit_prefopt.toy.judge import ToyJudge
from lit_prefopt.toy.vae import ToyVAETraining
from lit_prefopt.toy.web import ToyWeb

__all__ = ["ToyCLIPTraining", "ToyJudge", "ToyVAETraining", "ToyWeb"]

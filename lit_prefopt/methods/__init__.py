"""One paper, one file."""

from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.methods.spo import SPO
from lit_prefopt.methods.supervised import SupervisedFineTuning

__all__ = ["SPO", "DiffusionDPO", "SupervisedFineTuning"]

"""One paper, one file."""

from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.methods.supervised import SupervisedFineTuning

__all__ = ["DiffusionDPO", "SupervisedFineTuning"]

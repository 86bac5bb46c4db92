"""One paper, one file."""

from lit_prefopt.methods.consistency_distillation import ConsistencyDistillation
from lit_prefopt.methods.consistency_dpo import ConsistencyDPO
from lit_prefopt.methods.d3po import D3PO
from lit_prefopt.methods.dense_reward import DenseRewardDPO
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.methods.spo import SPO
from lit_prefopt.methods.supervised import SupervisedFineTuning

__all__ = [
    "D3PO",
    "SPO",
    "ConsistencyDPO",
    "ConsistencyDistillation",
    "DenseRewardDPO",
    "DiffusionDPO",
    "SupervisedFineTuning",
]

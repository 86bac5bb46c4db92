"""Preference optimisation methods, one file per paper."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.methods.capo import CaPO
    from lit_prefopt.methods.consistency_distillation import ConsistencyDistillation
    from lit_prefopt.methods.curriculum_dpo import ConsistencyDPO, CurriculumDPO
    from lit_prefopt.methods.d3po import D3PO
    from lit_prefopt.methods.dense_reward import DenseRewardDPO
    from lit_prefopt.methods.di3po import Di3PO
    from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
    from lit_prefopt.methods.diffusion_kto import DiffusionKTO
    from lit_prefopt.methods.diffusion_nft import DiffusionNFT
    from lit_prefopt.methods.dspo import DSPO
    from lit_prefopt.methods.inpo import InPO
    from lit_prefopt.methods.mapo import MaPO
    from lit_prefopt.methods.offline_nft import OfflineNFT
    from lit_prefopt.methods.pnapo import PNAPO
    from lit_prefopt.methods.policy_gradient import PolicyGradient
    from lit_prefopt.methods.rank_dpo import RankDPO
    from lit_prefopt.methods.smpo import SmPO
    from lit_prefopt.methods.spin import SPINDiffusion
    from lit_prefopt.methods.spo import SPO
    from lit_prefopt.methods.supervised import SupervisedFineTuning

__all__ = [
    "D3PO",
    "DSPO",
    "PNAPO",
    "SPO",
    "CaPO",
    "ConsistencyDPO",
    "ConsistencyDistillation",
    "CurriculumDPO",
    "DenseRewardDPO",
    "Di3PO",
    "DiffusionDPO",
    "InPO",
    "MaPO",
    "DiffusionKTO",
    "RankDPO",
    "DiffusionNFT",
    "OfflineNFT",
    "PolicyGradient",
    "SPINDiffusion",
    "SmPO",
    "SupervisedFineTuning",
]

__getattr__, __dir__ = lazy_names(__name__)

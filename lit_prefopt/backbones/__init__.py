"""Model families, one file each."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.backbones.base import Backbone, check_backbone
    from lit_prefopt.backbones.latent_consistency import LatentConsistency
    from lit_prefopt.backbones.lora import LoRA
    from lit_prefopt.backbones.policy import Policy, trained
    from lit_prefopt.backbones.stable_diffusion import StableDiffusion
    from lit_prefopt.backbones.stable_diffusion_3 import StableDiffusion3
    from lit_prefopt.backbones.stable_diffusion_xl import StableDiffusionXL

__all__ = [
    "Backbone",
    "LatentConsistency",
    "LoRA",
    "Policy",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "check_backbone",
    "trained",
]

__getattr__, __dir__ = lazy_names(__name__)

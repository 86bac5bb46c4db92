"""Model families, one file each."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.backbones.base import Backbone, check_backbone
    from lit_prefopt.backbones.chroma import Chroma
    from lit_prefopt.backbones.flux1 import Flux1
    from lit_prefopt.backbones.flux2_klein import Flux2Klein
    from lit_prefopt.backbones.latent_consistency import LatentConsistency
    from lit_prefopt.backbones.lora import LoRA
    from lit_prefopt.backbones.lumina2 import Lumina2
    from lit_prefopt.backbones.policy import Policy, trained
    from lit_prefopt.backbones.qwen_image import QwenImage
    from lit_prefopt.backbones.stable_diffusion import StableDiffusion
    from lit_prefopt.backbones.stable_diffusion_3 import StableDiffusion3
    from lit_prefopt.backbones.stable_diffusion_xl import StableDiffusionXL
    from lit_prefopt.backbones.z_image import ZImage

__all__ = [
    "Backbone",
    "Chroma",
    "Flux1",
    "Flux2Klein",
    "LatentConsistency",
    "LoRA",
    "Lumina2",
    "Policy",
    "QwenImage",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "check_backbone",
    "trained",
]

__getattr__, __dir__ = lazy_names(__name__)

"""Small transformers of the flow families, with random weights, without their pipelines."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from torch import nn

from lit_prefopt import families
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.families.z_image import Z_IMAGE


class Transformer(NamedTuple):
    """A family with the configurations of its transformer, small and of the published width."""

    family: families.Family
    kind: type[nn.Module]
    pipeline: Any
    convert: Any  # diffusers' reader of original names; Qwen-Image's are its own
    tiny: dict[str, Any]
    wide: dict[str, Any]  # a published width with few blocks

    def build(self, **changes: Any) -> nn.Module:
        """Return a small one with random weights, vectors too."""
        torch.manual_seed(0)
        return randomised(self.kind(**self.tiny | changes))

    def empty(self) -> nn.Module:
        """Return a wide one without weights."""
        with torch.device("meta"):
            return self.kind(**self.wide)


def randomised(net: nn.Module) -> nn.Module:
    """Return a network whose every parameter is random, as those of a trained one."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return net


TRANSFORMERS = {
    "flux1": Transformer(
        FLUX1,
        FluxTransformer2DModel,
        FluxPipeline,
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        {
            **{"patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
            **{"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)},
        },
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "flux2": Transformer(
        FLUX2,
        Flux2Transformer2DModel,
        Flux2KleinPipeline,
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        {
            **{"patch_size": 1, "in_channels": 128, "num_layers": 2, "num_single_layers": 2},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 48},
            **{"axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        },
        {
            **{"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 24},
            **{"joint_attention_dim": 7680, "guidance_embeds": False},
        },
    ),
    "qwen-image": Transformer(
        QWEN_IMAGE,
        QwenImageTransformer2DModel,
        QwenImagePipeline,
        dict,
        {
            **{"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16},
            **{"axes_dims_rope": (8, 4, 4)},
        },
        {"num_layers": 2},
    ),
    "z-image": Transformer(
        Z_IMAGE,
        ZImageTransformer2DModel,
        ZImagePipeline,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        {
            **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32},
            **{"n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
            **{"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [1024, 64, 64]},
        },
        {"n_layers": 2, "n_refiner_layers": 2},
    ),
}

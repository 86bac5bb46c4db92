"""Transformers of the flow families: small ones with random weights, and wide ones without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from torch import nn

from lit_prefopt import families
from lit_prefopt.families.chroma import CHROMA
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.families.lumina2 import LUMINA2
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.families.z_image import Z_IMAGE
from tests.helpers.tiny_chroma import tiny_chroma_pipeline, tiny_chroma_transformer
from tests.helpers.tiny_flux1 import tiny_flux1_pipeline, tiny_flux1_transformer
from tests.helpers.tiny_flux2 import tiny_flux2_pipeline, tiny_flux2_transformer
from tests.helpers.tiny_lumina2 import tiny_lumina2_pipeline, tiny_lumina2_transformer
from tests.helpers.tiny_qwen_image import tiny_qwen_image_pipeline, tiny_qwen_transformer
from tests.helpers.tiny_z_image import tiny_z_image_pipeline, tiny_z_image_transformer


class FlowFamily(NamedTuple):
    """A flow family in tests.

    Args:
        names: Names of its components and weights.
        kind: Class of its transformer.
        pipeline: Class of its stock pipeline.
        transformer: Builds a small transformer.
        write: Writes a small pipeline into a folder.
        convert: diffusers' reader of the transformer's original names.
        wide: Configuration of a transformer of a published width, with few blocks.
    """

    names: families.Family
    kind: type[nn.Module]
    pipeline: type[DiffusionPipeline]
    transformer: Callable[..., nn.Module]
    write: Callable[[Path], Path]
    convert: Callable[..., dict[str, torch.Tensor]]
    wide: dict[str, Any]

    def build(self) -> nn.Module:
        """Return a small transformer, every parameter of which is random."""
        torch.manual_seed(0)
        return randomised(self.transformer())

    def empty(self) -> nn.Module:
        """Return a wide transformer without weights."""
        with torch.device("meta"):
            return self.kind(**self.wide)


def randomised(net: nn.Module) -> nn.Module:
    """Return a network whose every parameter is random, as those of a trained one."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return net


FLOW_FAMILIES = {
    "flux1": FlowFamily(
        FLUX1,
        FluxTransformer2DModel,
        FluxPipeline,
        tiny_flux1_transformer,
        tiny_flux1_pipeline,
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "flux2": FlowFamily(
        FLUX2,
        Flux2Transformer2DModel,
        Flux2KleinPipeline,
        tiny_flux2_transformer,
        tiny_flux2_pipeline,
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        {
            **{"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 24},
            **{"joint_attention_dim": 7680, "guidance_embeds": False},
        },
    ),
    "qwen-image": FlowFamily(
        QWEN_IMAGE,
        QwenImageTransformer2DModel,
        QwenImagePipeline,
        tiny_qwen_transformer,
        tiny_qwen_image_pipeline,
        dict,  # its original names are diffusers' own
        {"num_layers": 2},
    ),
    "z-image": FlowFamily(
        Z_IMAGE,
        ZImageTransformer2DModel,
        ZImagePipeline,
        tiny_z_image_transformer,
        tiny_z_image_pipeline,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        {"n_layers": 2, "n_refiner_layers": 2},
    ),
    "chroma": FlowFamily(
        CHROMA,
        ChromaTransformer2DModel,
        ChromaPipeline,
        tiny_chroma_transformer,
        tiny_chroma_pipeline,
        single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
        {"num_layers": 2, "num_single_layers": 2},
    ),
    "lumina2": FlowFamily(
        LUMINA2,
        Lumina2Transformer2DModel,
        Lumina2Pipeline,
        tiny_lumina2_transformer,
        tiny_lumina2_pipeline,
        single_file_utils.convert_lumina2_to_diffusers,
        {"num_layers": 2, "cap_feat_dim": 2304},
    ),
}

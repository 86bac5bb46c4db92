"""Convert a pipeline to a single file in the original layout, for A1111 and ComfyUI."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.processes.marks import mark_tensors
from lit_prefopt.weights.ldm_names import open_clip_name, unet_names, vae_name

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "transformer.text_model."
OPEN_CLIP = "model."
TEXT = {
    "sd1": ("cond_stage_model." + CLIP,),
    "sd2": ("cond_stage_model." + OPEN_CLIP,),
    "sdxl": ("conditioner.embedders.0." + CLIP, "conditioner.embedders.1." + OPEN_CLIP),
}
"""Prefixes of the text encoders' keys, by family; OpenCLIP has another layout."""


def single_file_state(pipeline: DiffusionPipeline, family: str) -> dict[str, Tensor]:
    """Return all weights of a pipeline with their original keys.

    Args:
        pipeline: Stable Diffusion or SDXL.
        family: `sd1`, `sd2` or `sdxl`.
    """
    state = {UNET + name: tensor for name, tensor in unet_state(pipeline.unet).items()}
    state |= {VAE + name: tensor for name, tensor in vae_state(pipeline.vae).items()}
    for part, prefix in zip(("text_encoder", "text_encoder_2"), TEXT[family], strict=False):
        encoder = getattr(pipeline, part)
        inner = clip_state(encoder) if prefix.endswith(CLIP) else open_clip_state(encoder)
        state |= {prefix + name: tensor for name, tensor in inner.items()}
    levels = pipeline.scheduler.config
    predicts_v = levels.prediction_type == "v_prediction"
    state |= mark_tensors(predicts_v, bool(levels.get("rescale_betas_zero_snr")))
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def check_single_file(unet: UNet2DConditionModel) -> None:
    """Raise InputError for a UNet that the original layout does not support."""
    if unet.config.time_cond_proj_dim is not None:
        raise InputError(
            "This UNet has a guidance-scale embedding, which the original layout does not support: "
            "export it to unet or pipeline."
        )


def unet_state(unet: nn.Module) -> dict[str, Tensor]:
    """Return a UNet's weights with their original keys."""
    state = unet.state_dict()
    names = unet_names(state)
    return {names[name]: tensor for name, tensor in state.items()}


def vae_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return a VAE's weights with their original keys; its attention layers are convolutions."""
    blocks = len(vae.config.up_block_types)
    state = {}
    for name, tensor in vae.state_dict().items():
        linear = ".attentions." in name and tensor.ndim == 2
        state[vae_name(name, blocks)] = tensor[:, :, None, None] if linear else tensor
    return state


def clip_state(encoder: nn.Module) -> dict[str, Tensor]:
    """Return a text encoder's weights without transformers' optional prefix `text_model.`."""
    return {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}


def open_clip_state(encoder: nn.Module) -> dict[str, Tensor]:
    """Return a text encoder's weights in OpenCLIP's layout, with fused query, key and value."""
    state = clip_state(encoder)
    out = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif found := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            layer, letter, kind = found.groups()
            if letter == "q":
                fused = [state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{open_clip_name(layer)}.attn.in_proj_{kind}"] = torch.cat(fused)
        else:
            out[open_clip_name(name)] = tensor
    return out

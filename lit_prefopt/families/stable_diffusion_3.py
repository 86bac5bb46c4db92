"""Stable Diffusion 3 and 3.5: a transformer of joint blocks, two CLIP encoders, and T5."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Component, Config, Entry, Family, Layout
from lit_prefopt.families.ldm_layouts import as_is, clip_layouts
from lit_prefopt.families.ldm_names import replaced
from lit_prefopt.families.stable_diffusion import VAE

ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "attn.to_": "x_block.attn.qkv",
    "attn.add_": "context_block.attn.qkv",
    "attn2.to_": "x_block.attn2.qkv",
}
"""Query, key and value, which the original code has as one layer."""


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: Stability AI's, and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    found = [re.match(r"transformer_blocks\.(\d+)\.", name) for name in parameters]
    last = max(int(match[1]) for match in found if match)
    yield {name: _entry(name, last) for name in parameters}
    yield as_is(parameters)


def _entry(name: str, last: int) -> Entry:
    """Return the original entry of a parameter; the last block's context is a final norm alone."""
    if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name):
        block, rest = int(found[1]), found[2]
        start = f"joint_blocks.{block}."
        if fused := re.fullmatch(r"(attn2?\.(?:to|add)_)([qkv])(?:_proj)?\.(weight|bias)", rest):
            kind, letter, end = fused.groups()
            return Entry(f"{start}{FUSED[kind]}.{end}", piece="qkv".index(letter))
        swapped = block == last and rest.startswith("norm1_context.linear.")
        return Entry(start + replaced(rest, BLOCK), swapped=swapped)
    return Entry(replaced(name, ENDS), swapped=name.startswith("norm_out.linear."))


def t5_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of T5's encoder, whose embedding has two names or the first alone.

    Args:
        parameters: Names of all parameters.
    """
    for start in ("transformer.", ""):
        names = {name: Entry(start + name) for name in parameters}
        yield names
        yield names | {"encoder.embed_tokens.weight": Entry(f"{start}shared.weight")}


def _version(config: Config) -> str:
    """Return kohya's name of the size."""
    if not config.get("qk_norm"):
        return "medium"
    return "5-medium" if config.get("dual_attention_layers") else "5-large"


def _clip(number: str, letter: str, kohya: str) -> Component:
    return Component(
        f"text_encoder{number}",
        "CLIPTextModelWithProjection",
        (f"text_encoders.clip_{letter}.", f"text_encoder{number}.", ""),
        clip_layouts,
        package="transformers",
        # CLIP-L has no projection in the original files, and the identity in diffusers' folders
        identity=("text_projection.weight",) if letter == "l" else (),
        kohya=kohya,
        comfyui=f"text_encoders.clip_{letter}.transformer.",
    )


MODELS = {
    "medium": "Stable Diffusion 3 medium",
    "5-medium": "Stable Diffusion 3.5 medium",
    "5-large": "Stable Diffusion 3.5 large",
}
"""Titles by kohya's names of the sizes."""

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    denoiser=Component(
        "transformer",
        "SD3Transformer2DModel",
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        transformer_layouts,
        kohya="lora_unet",
        comfyui="diffusion_model.",
    ),
    vae=VAE,
    encoders=(
        _clip("", "l", "lora_te1"),
        _clip("_2", "g", "lora_te2"),
        Component(
            "text_encoder_3",
            "T5EncoderModel",
            ("text_encoders.t5xxl.", "text_encoder_3.", ""),
            t5_layouts,
            package="transformers",
            optional=True,
            kohya="lora_te3",
            comfyui="text_encoders.t5xxl.transformer.",
        ),
    ),
    backbone="StableDiffusion3",
    noise="flow",
    scale="shift",
    compared=(
        *("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "patch_size"),
        *("joint_attention_dim", "pooled_projection_dim", "dual_attention_layers", "qk_norm"),
    ),
    architecture=lambda config, v: f"stable-diffusion-3-{_version(config)}",
    kohya_version=lambda config, v: _version(config),
    kohya_module="networks.lora_sd3",
    whole_files=False,
    one_alpha=False,  # diffusers reads no file of kohya's for this family
    unread={"kohya": ("",), "comfyui": ("",)},
    stated={
        r"(stablediffusion|sd)v?3m(edium)?|medium": MODELS["medium"],
        r"(stablediffusion|sd)v?35m(edium)?|5medium": MODELS["5-medium"],
        r"(stablediffusion|sd)v?35l(arge)?(turbo)?|5large": MODELS["5-large"],
    },
    model=lambda config: MODELS[_version(config)],
    lora_targets=(
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
    ),
)

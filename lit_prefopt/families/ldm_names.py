"""Names of the original Stable Diffusion (LDM) code for diffusers' layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_WORDS = {
    "conv_norm_out": "norm_out",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_WORDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
}
BLOCK = re.compile(r"(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+?)\.(\d+)\.(.+)")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Map diffusers' names of a UNet's modules or parameters to the original names.

    Original blocks are numbered consecutively, each with one residual layer and its attention if
    it has one, or with a resampling layer; so a single name can be mapped only with all others.

    Args:
        names: All names, in diffusers' spelling.
    """
    names = [name for name in names if name]
    layers = 1 + max(
        int(found[1])
        for name in names
        if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))
    )
    attended = {m[1] for n in names if (m := re.match(r"(up_blocks\.\d+)\.attentions\.", n))}
    return {name: _unet_name(name, layers, attended) for name in names}


def vae_name(name: str, blocks: int) -> str:
    """Return the original name of a VAE's parameter.

    Args:
        name: Its name in diffusers.
        blocks: Number of the decoder's blocks, which the original code numbers in reverse.
    """
    if found := re.match(r"decoder\.up_blocks\.(\d+)", name):
        name = f"decoder.up_blocks.{blocks - 1 - int(found[1])}{name[found.end() :]}"
    words = VAE_WORDS | (VAE_ATTENTION if ".attentions." in name else {})
    return exchanged(name, words)


def open_clip_name(name: str) -> str:
    """Return OpenCLIP's name of a text encoder's parameter, given without `text_model.`."""
    return exchanged(name, OPEN_CLIP_WORDS)


def exchanged(name: str, words: dict[str, str]) -> str:
    """Replace whole words in a name, longer ones first."""
    for ours in sorted(words, key=len, reverse=True):
        name = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", words[ours], name)
    return name


def _unet_name(name: str, layers: int, attended: set[str]) -> str:
    found = BLOCK.fullmatch(name)
    if found is None:
        return replaced(name, UNET_ENDS)
    side, block, kind, layer, rest = found.groups()
    first = int(block or 0) * (layers + 1)
    if kind == "resnets":
        rest = replaced(rest, UNET_RESNET)
    position = 1 if kind == "attentions" else 0
    if side == "mid":
        return f"middle_block.{position or 2 * int(layer)}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        position = 2 if f"up_blocks.{block}" in attended else 1
        return f"output_blocks.{first + layers}.{position}.{rest}"
    if side == "down":
        return f"input_blocks.{1 + first + int(layer)}.{position}.{rest}"
    return f"output_blocks.{first + int(layer)}.{position}.{rest}"


def replaced(name: str, table: dict[str, str]) -> str:
    """Replace the prefix of a name (whole words) by the table."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name

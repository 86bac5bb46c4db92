"""Names of Qwen-Image's networks: the transformer has diffusers' own, the VAE those of Wan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_layouts import as_is
from lit_prefopt.families.ldm_names import exchanged, replaced

VAE_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{side}.{ours}": f"{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in {
            "conv_in": "conv1",
            "norm_out": "head.0",
            "conv_out": "head.2",
        }.items()
    },
}
VAE_BLOCK = {
    "down_blocks": "downsamples",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)")


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layout of the transformer, whose original names are those in diffusers.

    Args:
        parameters: Names of all parameters.
    """
    yield as_is(parameters)


def autoencoder_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the VAE: that of Wan's code, and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    found = [UP.fullmatch(name) for name in parameters]
    layers = 1 + max(int(match[3]) for match in found if match)
    yield {name: Entry(_vae_name(name, layers)) for name in parameters}
    yield as_is(parameters)


def _vae_name(name: str, layers: int) -> str:
    """Return Wan's name of a parameter; the blocks of its decoder are numbered consecutively."""
    if (end := replaced(name, VAE_ENDS)) != name:
        return end
    if found := UP.fullmatch(name):
        block, kind, layer, rest = found.groups()
        number = int(block) * (layers + 1) + (int(layer) if kind == "resnets" else layers)
        name = f"decoder.upsamples.{number}.{rest}"
    return exchanged(name, VAE_BLOCK)

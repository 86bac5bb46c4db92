"""Names of FLUX.1's original code (Black Forest Labs) for diffusers' layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_layouts import as_is
from lit_prefopt.families.ldm_names import replaced

ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
FUSED = {
    **{f"attn.to_{letter}": ("img_attn.qkv", n) for n, letter in enumerate("qkv")},
    **{f"attn.add_{letter}_proj": ("txt_attn.qkv", n) for n, letter in enumerate("qkv")},
}
"""Query, key and value of a double block, which the original code has as one layer."""

FUSED_SINGLE = {
    **{f"attn.to_{letter}": ("linear1", n) for n, letter in enumerate("qkv")},
    "proj_mlp": ("linear1", 3),
}
"""Query, key, value and the start of the MLP of a single block, likewise."""

BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: Black Forest Labs', and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    yield {name: original_entry(name) for name in parameters}
    yield as_is(parameters)


def original_entry(name: str) -> Entry:
    """Return the original entry of a parameter.

    Args:
        name: Its name in diffusers.
    """
    found = BLOCK.fullmatch(name)
    if found is None:
        return Entry(replaced(name, ENDS), swapped=name.startswith("norm_out.linear."))
    single, block, rest = found.groups()
    start = f"{'single' if single else 'double'}_blocks.{block}."
    layer, _, kind = rest.rpartition(".")
    fused = FUSED_SINGLE if single else FUSED
    if layer in fused:
        key, piece = fused[layer]
        return Entry(f"{start}{key}.{kind}", piece=piece)
    return Entry(start + replaced(rest, SINGLE if single else DOUBLE))

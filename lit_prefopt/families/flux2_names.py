"""Names of FLUX.2's original code (Black Forest Labs) for diffusers' layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.flux1_names import BLOCK, FUSED
from lit_prefopt.families.ldm_layouts import as_is, vae_layouts
from lit_prefopt.families.ldm_names import replaced

ENDS = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
VAE_ENDS = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: Black Forest Labs', and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    yield {name: _entry(name) for name in parameters}
    yield as_is(parameters)


def autoencoder_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the VAE: Black Forest Labs', ComfyUI's and those of diffusers.

    In the original code the two outer convolutions are the encoder's and the decoder's own.

    Args:
        parameters: Names of all parameters.
    """
    for number, layout in enumerate(vae_layouts(parameters)):
        if number == 0:
            yield {p: e._replace(key=replaced(e.key, VAE_ENDS)) for p, e in layout.items()}
        yield layout


def _entry(name: str) -> Entry:
    """Return the original entry of a parameter."""
    found = BLOCK.fullmatch(name)
    if found is None:
        return Entry(replaced(name, ENDS), swapped=name.startswith("norm_out.linear."))
    single, block, rest = found.groups()
    start = f"{'single' if single else 'double'}_blocks.{block}."
    layer, _, kind = rest.rpartition(".")
    if not single and layer in FUSED:
        key, piece = FUSED[layer]
        return Entry(f"{start}{key}.{kind}", piece=piece)
    return Entry(start + replaced(rest, SINGLE if single else DOUBLE))

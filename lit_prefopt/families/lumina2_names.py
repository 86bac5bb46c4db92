"""Names of Lumina Image 2.0's original code (Alpha-VLLM) for diffusers' layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_layouts import as_is
from lit_prefopt.families.ldm_names import exchanged

WORDS = {
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder": "cap_embedder",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
    "norm1.linear": "adaLN_modulation.1",
    "norm1.norm": "attention_norm1",
    "norm1": "attention_norm1",  # of the context refiner, which has no modulation
    "norm2": "attention_norm2",
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    **{f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
}


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: Alpha-VLLM's, and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    yield {name: _entry(name) for name in parameters}
    yield as_is(parameters)


def _entry(name: str) -> Entry:
    """Return the original entry of a parameter: query, key and value are one layer there."""
    if found := re.fullmatch(r"(.+)\.attn\.to_([qkv])\.weight", name):
        start, letter = found.groups()
        return Entry(f"{start}.attention.qkv.weight", piece="qkv".index(letter))
    return Entry(exchanged(name, WORDS))

"""Names of Z-Image's transformer in the files of ComfyUI for diffusers' layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_layouts import as_is
from lit_prefopt.families.ldm_names import exchanged

WORDS = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
}


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: ComfyUI's, and diffusers', which is the release's.

    Args:
        parameters: Names of all parameters.
    """
    yield {name: _entry(name) for name in parameters}
    yield as_is(parameters)


def _entry(name: str) -> Entry:
    """Return ComfyUI's entry of a parameter: query, key and value are one layer there."""
    if found := re.fullmatch(r"(.+\.attention)\.to_([qkv])\.(weight|bias)", name):
        start, letter, kind = found.groups()
        return Entry(f"{start}.qkv.{kind}", piece="qkv".index(letter))
    return Entry(exchanged(name, WORDS))

"""Names of Chroma's original code for diffusers' layers: FLUX.1's, without modulation layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.flux1_names import original_entry
from lit_prefopt.families.ldm_layouts import as_is

APPROXIMATOR = re.compile(r"(distilled_guidance_layer\.(?:layers|norms)\.\d+\.)(.+)")
"""A layer of the network that computes scale, shift and gate of all blocks."""

ENDS = {
    "linear_1.weight": "in_layer.weight",
    "linear_1.bias": "in_layer.bias",
    "linear_2.weight": "out_layer.weight",
    "linear_2.bias": "out_layer.bias",
    "weight": "scale",  # of a norm
}


def transformer_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of the transformer: the original one, and diffusers'.

    Args:
        parameters: Names of all parameters.
    """
    yield {name: _entry(name) for name in parameters}
    yield as_is(parameters)


def _entry(name: str) -> Entry:
    """Return the original entry of a parameter."""
    if found := APPROXIMATOR.fullmatch(name):
        start, end = found.groups()
        return Entry(start + ENDS[end])
    return original_entry(name)

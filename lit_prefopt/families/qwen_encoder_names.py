"""Names of the language models Qwen3 and Qwen2.5-VL in the files of ComfyUI and of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_layouts import as_is

HEAD = "lm_head.weight"
"""The output layer, which no prompt is encoded with; of the small models it is the embedding."""

PARTS = {"model.language_model.": "model.", "model.visual.": "visual."}
"""Beginnings of the names of Qwen2.5-VL's parts in transformers, and in published files."""


def qwen3_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of Qwen3, with or without its output layer.

    Args:
        parameters: Names of all parameters.
    """
    inner = {name: name.removeprefix("model.") for name in parameters}
    names = {p: n if n == HEAD else f"model.{n}" for p, n in inner.items()}
    yield from _stored(names)
    yield as_is(parameters)


def qwen25_vl_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of Qwen2.5-VL: the published one, and that of transformers 5.

    Args:
        parameters: Names of all parameters.
    """
    names = {}
    for name in parameters:
        start = next((start for start in PARTS if name.startswith(start)), "")
        names[name] = PARTS.get(start, "") + name.removeprefix(start)
    yield from _stored(names)
    yield as_is(parameters)


def _stored(names: dict[str, str]) -> Iterator[Layout]:
    """Yield the layouts of names: within ComfyUI's checkpoints or alone, with a head or without."""
    for start in ("transformer.", ""):
        layout = {name: Entry(start + stored) for name, stored in names.items()}
        yield layout
        if HEAD in names:
            yield layout | {HEAD: Entry(f"{start}model.embed_tokens.weight")}

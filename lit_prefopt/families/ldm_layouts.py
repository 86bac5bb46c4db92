"""Layouts of UNets, VAEs and CLIP text encoders in files: original names, and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_prefopt.families.base import Entry, Layout
from lit_prefopt.families.ldm_names import open_clip_name, unet_names, vae_name

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of a VAE's attention layers in early versions of diffusers."""


def as_is(parameters: Sequence[str]) -> Layout:
    """Return the layout of files that have the network's own names.

    Args:
        parameters: Names of all parameters.
    """
    return {name: Entry(name) for name in parameters}


def unet_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of a UNet.

    Args:
        parameters: Names of all parameters.
    """
    original = unet_names(parameters)
    yield {name: Entry(original[name]) for name in parameters}
    yield as_is(parameters)


def vae_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of an AutoencoderKL.

    Args:
        parameters: Names of all parameters.
    """
    numbers = [int(m[1]) for p in parameters if (m := re.match(r"decoder\.up_blocks\.(\d+)", p))]
    blocks = 1 + max(numbers)
    # the original code's attention layers are 1 x 1 convolutions
    yield {p: Entry(vae_name(p, blocks), conv=".attentions." in p) for p in parameters}
    yield as_is(parameters)
    yield {p: Entry(_old_vae_name(p)) for p in parameters}


def clip_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of a text encoder that is stored as transformers names it.

    Args:
        parameters: Names of all parameters.
    """
    inner = {name: name.removeprefix("text_model.") for name in parameters}
    for start in ("transformer.", ""):
        # early files, and what was merged from them, have no `text_model.`
        for middle in ("text_model.", ""):
            yield {
                p: Entry(start + (n if n.startswith("text_projection") else middle + n))
                for p, n in inner.items()
            }


def open_clip_layouts(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield the layouts of a text encoder that is stored as OpenCLIP names it.

    Args:
        parameters: Names of all parameters.
    """
    for start in ("model.", ""):
        yield {name: _open_clip(name.removeprefix("text_model."), start) for name in parameters}


def clip_first(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield all layouts of a text encoder, transformers' first."""
    yield from clip_layouts(parameters)
    yield from open_clip_layouts(parameters)


def open_clip_first(parameters: Sequence[str]) -> Iterator[Layout]:
    """Yield all layouts of a text encoder, OpenCLIP's first."""
    yield from open_clip_layouts(parameters)
    yield from clip_layouts(parameters)


def _old_vae_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    for new, old in OLD_VAE.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _open_clip(name: str, prefix: str) -> Entry:
    """Return the entry of a text encoder's parameter in OpenCLIP's layout."""
    if name == "text_projection.weight":
        return Entry(f"{prefix}text_projection", transposed=True)
    if found := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
        layer, letter, kind = found.groups()
        key = f"{prefix}{open_clip_name(layer)}.attn.in_proj_{kind}"
        return Entry(key, piece="qkv".index(letter))
    return Entry(prefix + open_clip_name(name))

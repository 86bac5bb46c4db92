"""Memory format and compilation of networks."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence

import torch
from diffusers import ModelMixin

from lit_prefopt.backbones.repeated_blocks import require_blocks
from lit_prefopt.errors import InputError

COMPILATIONS = 64
"""Limit of compilations of one function, for which torch's 8 do not suffice: three kinds of blocks
(Stable Diffusion 3.5) times adapter on and off, with and without gradients, and sizes of images."""


def apply_memory_format_and_compile(
    networks: Sequence[ModelMixin], *, channels_last: bool, compiled: bool
) -> None:
    """Set channels-last layout and compile repeated blocks; parameters and keys do not change.

    Args:
        networks: The networks; policy and reference must be given together to agree exactly.
        channels_last: Store the channels of a pixel contiguously, the fast layout of convolutions
            on GPUs.
        compiled: Compile the repeated blocks of a network, once for each kind of block (first use:
            a minute or two). Adapters can still be switched and activations checkpointed; policy
            and reference then agree up to rounding, since passes with and without gradients are
            compiled separately.

    Raises:
        InputError: Networks are to be compiled, and there is no compiler.
    """
    if compiled:
        _check_compiler()
    for network in networks:
        if channels_last:
            _to_channels_last(network)
        if compiled:
            limits = torch._dynamo.config
            limits.cache_size_limit = max(COMPILATIONS, limits.cache_size_limit)
            for block in require_blocks(network, "--backbone.compile"):
                block.compile(fullgraph=True)


def _check_compiler() -> None:
    """Check before anything is trained that torch finds the compilers that it calls."""
    on_gpu = torch.cuda.is_available()
    named = os.environ.get("CC" if on_gpu else "CXX")
    known = [named] if named else ["gcc", "clang", "cc"] if on_gpu else ["g++"]
    missing = [] if any(map(shutil.which, known)) else [" or ".join(known)]
    if on_gpu and importlib.util.find_spec("triton") is None:
        missing.append("triton")
    if missing:
        raise InputError(
            f"`--backbone.compile` needs {' and '.join(missing)}, which torch would call and which "
            "is not installed: install it, or leave the option false."
        )


def _to_channels_last(network: ModelMixin) -> None:
    """Store a pixel's channels contiguously; `to` refuses networks with weights for videos."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in (*network.parameters(), *network.buffers()):
        if weight.ndim in formats:
            weight.data = weight.data.to(memory_format=formats[weight.ndim])

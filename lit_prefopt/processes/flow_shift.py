"""Shift of a flow's noise levels by the resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def linear_shift(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """Return the shift mu on the line through two numbers of tokens, as FLUX.1 and Qwen-Image.

    Args:
        config: The scheduler's configuration.
        tokens: Number of image tokens.
        steps: Number of sampling steps, which does not count here.
    """
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (last - first)
    return float(tokens * slope + (config["base_shift"] - slope * first))


def flux2_shift(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """Return the shift mu of FLUX.2, fitted by its authors to image tokens and sampling steps.

    Up to 4,300 tokens it lies on the line through their fits for 10 and for 200 steps; beyond, it
    is that of 200 steps (`src/flux2/sampling.py` of their repository).

    Args:
        config: The scheduler's configuration, which does not count here.
        tokens: Number of image tokens.
        steps: Number of sampling steps.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)

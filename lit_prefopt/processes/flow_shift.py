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

"""Align text-to-image diffusion models with human preferences."""

from __future__ import annotations

from typing import Any

from lit_prefopt.errors import InputError

__all__ = ["InputError", "load"]


def __getattr__(name: str) -> Any:
    """Return `load`, whose module imports diffusers and lightning, once it is asked for."""
    if name == "load":
        from lit_prefopt.runs.load import load

        return load
    raise AttributeError(f"module 'lit_prefopt' has no attribute {name!r}")

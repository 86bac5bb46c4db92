"""Align text-to-image diffusion models with human preferences."""

from lit_prefopt.checkpoint import load
from lit_prefopt.errors import InputError

__all__ = ["InputError", "load"]

"""Align text-to-image diffusion models with human preferences."""

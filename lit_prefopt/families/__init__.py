"""Model families: their components, and the names of their weights in all programs' files."""

from lit_prefopt.families.base import Component, Entry, Family
from lit_prefopt.families.known import FAMILIES, denoiser_of, family_of
from lit_prefopt.families.stable_diffusion import SD1, SD2
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.families.stable_diffusion_xl import SDXL

__all__ = [
    "FAMILIES",
    "SD1",
    "SD2",
    "SD3",
    "SDXL",
    "Component",
    "Entry",
    "Family",
    "denoiser_of",
    "family_of",
]

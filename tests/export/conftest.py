"""Fixtures: pipelines with random weights, and random LoRAs that change them."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from tests.helpers.exporting import (
    Family,
)


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> Family:
    """Stable Diffusion 1.x, then SDXL."""
    if request.param == "sd":
        return Family(StableDiffusionPipeline, request.getfixturevalue("tiny_folder"))
    return Family(StableDiffusionXLPipeline, request.getfixturevalue("tiny_xl_folder"))

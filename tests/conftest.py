"""Fixtures: a very small Stable Diffusion with random weights, made anew in each test session."""

from __future__ import annotations

import pytest
import torch

from lit_prefopt.backbones import StableDiffusion
from tests.tiny import tiny_pipeline

torch.set_num_threads(1)  # the networks are so small that a second thread costs time


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole Stable Diffusion pipeline with random weights, 32 x 32 pixels."""
    return str(tiny_pipeline(tmp_path_factory.mktemp("tiny") / "stable-diffusion"))


@pytest.fixture
def backbone(tiny_folder: str) -> StableDiffusion:
    """A full fine-tune of it, with a frozen copy as reference."""
    return StableDiffusion(tiny_folder)

"""A step-aware judge in training, on the tiny pipeline and the tiny CLIP."""

from __future__ import annotations

import pytest

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.judges import StepAwarePreference
from tests.helpers.step_aware import SGD, Make


@pytest.fixture
def make(tiny_folder: str, tiny_clip_folder: str) -> Make:
    """Return a function that makes a module on the tiny pipeline and CLIP."""

    def made(family: type = StableDiffusion, pipeline: str = tiny_folder, **options: object):
        backbone = family(pipeline, **options.pop("backbone", {"reference": "none"}))
        settings = {"pretrained": tiny_clip_folder, "processor": None, "guidance": 3.0}
        return StepAwarePreference(backbone, SGD(0.1), **settings | options).train()

    return made

"""Fixtures: a very small Stable Diffusion with random weights, and pairs for it."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: tests never ask the hub
# trainings store what they encode in the user's cache: tests have one of their own
CACHES = tempfile.TemporaryDirectory()
atexit.register(CACHES.cleanup)
USERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("HF_HOME", str(USERS / "huggingface"))  # where weights may be
os.environ.setdefault("TORCH_HOME", str(USERS / "torch"))
os.environ["XDG_CACHE_HOME"] = CACHES.name

import tests.helpers.forked  # noqa: F401 isort: skip - while no library has set a variable

import numpy as np
import pytest
import torch

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from tests.helpers.recipes import small_recipe
from tests.helpers.tiny import tiny_clip, tiny_lcm, tiny_pipeline, tiny_xl_pipeline
from tests.helpers.tiny_sd3 import tiny_sd3_pipeline, tiny_sd35_pipeline
from tests.helpers.tiny_toy_flow import tiny_toy_flow

torch.set_num_threads(1)  # the networks are so small that a second thread costs time


BEFORE = dict(os.environ)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take back what runs of tests and fixtures set for their children, such as LOCAL_RANK."""
    restore_environment()
    yield
    restore_environment()


def restore_environment() -> None:
    """Give all variables but pytest's own the values that they had before the first test."""
    for name in {*os.environ, *BEFORE}:
        if name.startswith("PYTEST_"):
            continue
        if name not in BEFORE:
            del os.environ[name]
        elif os.environ.get(name) != BEFORE[name]:
            os.environ[name] = BEFORE[name]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole Stable Diffusion pipeline with random weights, 32 x 32 pixels."""
    return str(tiny_pipeline(tmp_path_factory.mktemp("tiny") / "stable-diffusion"))


@pytest.fixture(scope="session")
def tiny_lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole latent consistency model with random weights, 32 x 32 pixels."""
    return str(tiny_lcm(tmp_path_factory.mktemp("tiny") / "lcm"))


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole SDXL pipeline with random weights, 32 x 32 pixels."""
    return str(tiny_xl_pipeline(tmp_path_factory.mktemp("tiny") / "sdxl"))


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole Stable Diffusion 3 pipeline with random weights, 32 x 32 pixels."""
    return str(tiny_sd3_pipeline(tmp_path_factory.mktemp("tiny") / "sd3"))


@pytest.fixture(scope="session")
def tiny_sd35_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole Stable Diffusion 3.5 pipeline with random weights, 32 x 32 pixels."""
    return str(tiny_sd35_pipeline(tmp_path_factory.mktemp("tiny") / "sd35"))


@pytest.fixture(scope="session")
def tiny_sd35_without_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Stable Diffusion 3.5 pipeline that was saved without T5."""
    return str(tiny_sd35_pipeline(tmp_path_factory.mktemp("tiny") / "sd35", t5=False))


@pytest.fixture(scope="session")
def toy_flow_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small flow twin of the toy world with random weights, 32 x 32 pixels."""
    return str(tiny_toy_flow(tmp_path_factory.mktemp("tiny") / "toy-flow"))


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a whole CLIP with random weights, 32 x 32 pixels."""
    return str(tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def backbone(tiny_folder: str) -> StableDiffusion:
    """A full fine-tune of it, with a frozen copy as reference."""
    return StableDiffusion(tiny_folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with 24 pairs that a network can tell apart: bright against dark."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pairs") / "shards"
    with ShardWriter(folder, max_count=10) as writer:
        for i in range(24):
            dark = random.integers(0, 128, (40, 48, 3), dtype=np.uint8)
            scores = {"chosen": 0.5 + i / 24, "rejected": 0.5}
            meta = {"gap": i / 24, "scores": scores}
            writer.add(f"picture number {i}", dark + np.uint8(120), dark, meta)
    return str(folder)


@pytest.fixture
def recipe(tiny_folder: str, shards: str, tmp_path: Path) -> list[str]:
    """Arguments of a small Diffusion-DPO run in a folder of its own."""
    return small_recipe(tiny_folder, shards, tmp_path / "run")


@pytest.fixture(scope="session")
def exact(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of four steps of three batches each, whose folder holds its end.

    To be run again in another folder, with interruptions.
    """
    arguments = small_recipe(tiny_folder, shards, tmp_path_factory.mktemp("exact") / "run")
    arguments += ["--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", "4"]
    arguments += ["--trainer.val_check_interval", "6", "--data.batch_size", "3"]  # of 8 an epoch
    arguments += ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
    main(["fit", *arguments])
    return arguments

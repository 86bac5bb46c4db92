"""CLIP judges against transformers' own CLIP, and the step-aware model at its start."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

from lit_prefopt.errors import InputError
from lit_prefopt.judges import CLIPJudge, PickScore, StepAware
from lit_prefopt.judges.step_aware import StepAwareCLIP
from tests.helpers.published import _published
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

TEXTS = ["a cat", "a dog in the rain", "the sea"]


@pytest.fixture
def folder(tiny_clip_folder: str) -> str:
    """A small CLIP with random weights, its tokenizer and its image processor."""
    return tiny_clip_folder


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_scores_are_those_of_transformers_used_by_hand(folder: str, size: tuple[int, int]) -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    pictures = [Image.fromarray(picture).convert("RGB") for picture in bytes_]
    model = CLIPModel.from_pretrained(folder).eval()
    judge = CLIPJudge(folder, batch_size=2)
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    tokens = judge.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(tokens, pixels).logits_per_image.diagonal()
    images = torch.from_numpy(bytes_).permute(0, 3, 1, 2) / 127.5 - 1
    ours = judge.score(images, TEXTS)
    assert ours.dtype == torch.float32
    assert torch.equal(PickScore(folder, folder, batch_size=2).score(images, TEXTS), ours)
    # PIL resizes bytes and rounds them; of the size that it needs an image is left as it is
    torch.testing.assert_close(ours, theirs, atol=1e-5 if size == (32, 32) else 2e-2, rtol=1e-4)


def test_it_starts_as_the_clip_that_it_came_from(folder: str) -> None:
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    judge = CLIPJudge(folder)
    judge.crop = "tensor"
    plain = judge.score(images, TEXTS)
    for t in (None, torch.tensor([0, 500, 999])):
        aware = StepAware(None, folder, folder).score(images, TEXTS, t)
        torch.testing.assert_close(aware, plain, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_modulation(folder: str) -> None:
    model = StepAwareCLIP.start_from(CLIPModel.from_pretrained(folder))
    # where the modulations' weights are zero, nothing flows further back: one step away it does
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.get_image_features(
        torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    ).square().sum().backward()
    names = [n for n, _ in model.named_parameters() if "adaLN" in n or "t_embedder" in n]
    assert len(names) == 2 * 2 + 2 + 4
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.grad.abs().max() > 0, name


def test_the_timestep_matters_once_it_has_learned(folder: str) -> None:
    judge = StepAware(None, folder, folder)
    with torch.no_grad():
        for name, parameter in judge.clip.named_parameters():
            if "adaLN" in name and "weight" in name:
                parameter.normal_(std=0.2)
    image = torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1) * 2 - 1
    early, late = judge.score(image, ["a cat"] * 2, torch.tensor([0, 900]))
    assert (early - late).abs() > 1e-4


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_published_layout(folder: str, tmp_path: Path, suffix: str) -> None:
    """A made-up file of the published names and shapes, at a small size."""
    state, file = _published(), tmp_path / f"made-up{suffix}"
    torch.save(state, file) if suffix == ".bin" else save_file(state, file)
    judge = StepAware(str(file), folder, folder)
    loaded = judge.clip.state_dict()
    assert {f"model.{name}" for name in loaded} == set(state)
    assert all(torch.equal(loaded[name.removeprefix("model.")], state[name]) for name in state)


def test_a_file_of_another_model_is_refused(folder: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(InputError, match="does not fit a step-aware model"):
        StepAware(str(tmp_path / "other.bin"), folder, folder).clip  # noqa: B018
    with pytest.raises(InputError, match="There is no file .*none.bin: name the step-aware"):
        StepAware(str(tmp_path / "none.bin"), folder, folder)
    (tmp_path / "broken.bin").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="cannot be read as weights"):
        StepAware(str(tmp_path / "broken.bin"), folder, folder).clip  # noqa: B018


def test_what_is_no_clip_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere has no CLIP .*--config configs/toy/clip.yaml"):
        CLIPJudge(str(tmp_path / "nowhere")).clip  # noqa: B018
    tokenizer = tiny_tokenizer(tmp_path / "text")
    CLIPTextModel(tiny_text_config(tokenizer)).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="text has no CLIP that can be loaded"):
        CLIPJudge(str(tmp_path / "text")).clip  # noqa: B018
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no tokenizer .*its vocabulary is empty"):
        CLIPJudge(folder, str(tmp_path / "empty")).tokenizer  # noqa: B018
    with pytest.raises(InputError, match="text has no image processor"):
        CLIPJudge(folder, str(tmp_path / "text")).image_processor  # noqa: B018


def test_a_clip_with_nan_is_refused(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    state = load_file(file)
    state["visual_projection.weight"][0, 0] = torch.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"contains NaN.*\(visual_projection.weight\)"):
        CLIPJudge(str(tmp_path / "clip")).clip  # noqa: B018

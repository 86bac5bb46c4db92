"""Checkpoints with a noise process, a VAE or a tokenizer of another kind: read, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.commands.export import export
from lit_prefopt.errors import InputError
from lit_prefopt.toy.backbone import CHECKPOINT
from tests.helpers.tiny import tiny_pipeline, tiny_vae

Edit = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def edited(tiny_folder: str, tmp_path: Path) -> Edit:
    """Return a function that copies the tiny pipeline and changes one of its configurations."""

    def edit(file: str, changes: dict[str, Any]) -> str:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_folder, folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return str(folder)

    return edit


@pytest.fixture(scope="module")
def marked(tiny_xl_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Single SDXL file with the marks of v prediction and zero terminal SNR, as NoobAI-XL's."""
    folder = tmp_path_factory.mktemp("marked")
    export(tiny_xl_folder, "single-file", str(folder / "plain.safetensors"))
    state = load_file(folder / "plain.safetensors")
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(state | marks, folder / "noob.safetensors")
    return str(folder / "noob.safetensors")


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def test_marks_override_the_pipeline_of_the_architecture(
    marked: str, tiny_xl_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        process = StableDiffusionXL(marked, config=tiny_xl_folder, encoders=False).process
    assert process.prediction == "v_prediction"
    assert process.scheduler.alphas_cumprod[-1] == 0
    said = messages(caplog)
    assert "v prediction (v_pred) with zero terminal SNR (ztsnr)" in said
    assert "read with v_prediction and zero terminal SNR" in said


def test_the_recipe_overrides_the_marks(marked: str, tiny_xl_folder: str) -> None:
    arguments: dict[str, Any] = {"config": tiny_xl_folder, "encoders": False}
    own = {"prediction": "epsilon", "zero_terminal_snr": False}
    process = StableDiffusionXL(marked, **arguments, **own).process
    assert process.prediction == "epsilon"
    assert process.scheduler.alphas_cumprod[-1] > 0.004
    with pytest.raises(InputError, match="zero terminal SNR"):
        StableDiffusionXL(marked, **arguments, prediction="epsilon")


def test_v_prediction_alone_says_how_to_end_in_pure_noise(tiny_folder: str) -> None:
    with pytest.warns(UserWarning, match=r"keeps 0\.0047 of .*zero_terminal_snr true"):
        process = StableDiffusion(tiny_folder, prediction="v_prediction").process
    assert not process.zero_terminal_snr
    zero = StableDiffusion(tiny_folder, prediction="v_prediction", zero_terminal_snr=True).process
    assert zero.scheduler.alphas_cumprod[-1] == 0


def test_a_scheduler_of_another_process_is_refused(edited: Edit) -> None:
    folder = edited(
        "scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}
    )
    with pytest.raises(InputError, match="is a EDMDPMSolverMultistepScheduler"):
        StableDiffusion(folder)
    with pytest.raises(InputError, match="is a EDMDPMSolverMultistepScheduler"):
        export(folder, "pipeline", f"{folder}-out")


@pytest.mark.parametrize("encoders", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "mean and a deviation of each"),
        ({"shift_factor": 0.1159}, "shifts its latents .shift_factor 0.1159"),
        ({"scaling_factor": 0}, "has the scaling_factor 0"),
        ({"scaling_factor": None}, "has the scaling_factor None"),
    ],
)
def test_a_vae_with_other_latents_is_refused(
    encoders: bool, changes: dict[str, Any], message: str, edited: Edit
) -> None:
    folder = edited("vae/config.json", changes)
    with pytest.raises(InputError, match=message):
        StableDiffusion(folder, encoders=encoders)


def test_a_vae_of_another_class_or_width_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    with pytest.raises(InputError, match="is a AutoencoderTiny and not a AutoencoderKL"):
        StableDiffusion(tiny_folder, vae=str(tmp_path / "tiny"))
    tiny_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="16 latent channels and the denoiser 4"):
        StableDiffusion(tiny_folder, vae=str(tmp_path / "wide"))


def test_a_tokenizer_without_its_vocabulary_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    """Transformers loads it without an error, and every prompt is the same then."""
    folder = tmp_path / "no-words"
    shutil.copytree(tiny_folder, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"tokens and its text encoder 514: copy"):
        StableDiffusion(str(folder))


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "tiny")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(CHECKPOINT / "tokenizer", folder / "tokenizer")
    with pytest.raises(InputError, match="has 605 tokens and its text encoder 514"):
        StableDiffusion(str(folder))

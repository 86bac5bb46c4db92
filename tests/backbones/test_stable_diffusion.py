"""The backbone against the stock diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.batches import Prompt
from lit_prefopt.errors import InputError


@pytest.fixture(scope="module")
def stock(tiny_folder: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


def test_prompts_are_embedded_as_the_stock_pipeline_does(
    backbone: StableDiffusion, stock: StableDiffusionPipeline
) -> None:
    texts = ["a cat", "", "a very long prompt that does not fit into the encoder at all"]
    theirs, _ = stock.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(backbone.embed(texts).hidden, theirs)


def test_latents_are_the_stock_vaes(
    backbone: StableDiffusion, stock: StableDiffusionPipeline
) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = backbone.encode(images)
    posterior = stock.vae.encode(images).latent_dist
    factor = stock.vae.config.scaling_factor
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(deviation, posterior.std * factor)
    rebuilt = stock.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode(mean), rebuilt, atol=1e-4, rtol=1e-4)


def test_prediction_is_the_stock_unets(
    backbone: StableDiffusion, stock: StableDiffusionPipeline
) -> None:
    latents, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 16, 32)
    theirs = stock.unet(latents, t, prompt).sample
    torch.testing.assert_close(backbone.predict(latents, t, Prompt(prompt)), theirs)


def test_latent_shape(backbone: StableDiffusion) -> None:
    assert backbone.encode(torch.zeros(1, 3, 32, 32))[0].shape[1:] == backbone.latent_shape


def test_fresh_denoiser_from_a_configuration(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copyfile(Path(tiny_folder) / "unet" / "config.json", tmp_path / "unet.json")
    fresh = StableDiffusion(tiny_folder, str(tmp_path / "unet.json"), reference="none")
    loaded = StableDiffusion(tiny_folder, reference="none")
    ours, theirs = (b.policy.denoiser.conv_in.weight for b in (fresh, loaded))
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)


def test_reference_from_another_folder(tiny_folder: str, tmp_path: Path) -> None:
    other = StableDiffusion(tiny_folder, reference="none")
    with torch.no_grad():
        other.policy.denoiser.conv_out.bias.add_(1.0)
    other.save(tmp_path)
    backbone = StableDiffusion(tiny_folder, reference=str(tmp_path / "unet"))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), backbone.embed(["a"])
    with backbone.as_reference():
        reference = backbone.predict(*inputs)
    torch.testing.assert_close(reference, backbone.predict(*inputs) + 1, atol=1e-5, rtol=1e-5)


def test_lora_is_float32_over_a_coarser_base(tiny_folder: str) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4, alpha=8), dtype="bfloat16")
    for name, parameter in backbone.named_parameters():
        trained = "lora" in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


def test_lora_file_keeps_its_alpha(tiny_folder: str, tmp_path: Path) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4, alpha=16))
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    backbone.save(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    latents, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 32)
    theirs = stock.unet(latents, t, prompt).sample
    torch.testing.assert_close(backbone.predict(latents, t, Prompt(prompt)), theirs)
    with backbone.as_reference():
        assert not torch.allclose(backbone.predict(latents, t, Prompt(prompt)), theirs, atol=1e-3)


def test_without_a_reference_nobody_speaks_for_it(tiny_folder: str) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4), reference="none")
    with pytest.raises(InputError, match="--backbone.reference initial"), backbone.as_reference():
        pass


def test_a_folder_without_a_vae_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(InputError, match="has no vae"):
        StableDiffusion(str(broken))


def test_a_prediction_that_cannot_be_trained_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "sample"
    shutil.copytree(tiny_folder, other)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(InputError, match="cannot be trained"):
        StableDiffusion(str(other))

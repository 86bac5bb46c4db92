"""The backbone against the stock diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def stock(tiny_folder: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


def test_prompts_are_embedded_as_the_stock_pipeline_does(
    backbone: StableDiffusion, stock: StableDiffusionPipeline
) -> None:
    texts = ["a cat", "", "a very long prompt that does not fit into the encoder at all"]
    theirs, _ = stock.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(backbone.embed(texts)["hidden"], theirs)


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
    torch.testing.assert_close(backbone.predict(latents, t, Prompt({"hidden": prompt})), theirs)


def test_latent_shape(backbone: StableDiffusion) -> None:
    assert backbone.encode(torch.zeros(1, 3, 32, 32))[0].shape[1:] == backbone.latent_shape


def test_images_of_another_size_are_sampled(
    backbone: StableDiffusion, stock: StableDiffusionPipeline
) -> None:
    """The stock pipeline draws the same canvas from the same noise."""
    how = Sampling(steps=3, guidance=3.0, height=32, width=48)
    ours = sample(backbone, ["a cat"], torch.tensor([5]), how)
    assert ours.shape == (1, 3, 32, 48)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a cat",
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=draws.normal(torch.tensor([5]), (4, 8, 12), "start"),
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="a multiple of 4"):
        sample(backbone, ["a cat"], torch.tensor([5]), Sampling(steps=1, width=47))


def test_fresh_denoiser_from_a_configuration(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copyfile(Path(tiny_folder) / "unet" / "config.json", tmp_path / "unet.json")
    fresh = StableDiffusion(tiny_folder, denoiser=str(tmp_path / "unet.json"), reference="none")
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


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_q", "proj_in", "conv1"]])
def test_lora_file_keeps_its_alpha_and_all_its_layers(
    tiny_folder: str, tmp_path: Path, targets: list[str]
) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4, alpha=16, targets=targets))
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    backbone.save(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    latents, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 32)
    theirs = stock.unet(latents, t, prompt).sample
    torch.testing.assert_close(backbone.predict(latents, t, Prompt({"hidden": prompt})), theirs)
    with backbone.as_reference():
        assert not torch.allclose(
            backbone.predict(latents, t, Prompt({"hidden": prompt})), theirs, atol=1e-3
        )


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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_part_is_named(part: str, tiny_folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    [weights] = (broken / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=f"has no {part} that can be loaded"):
        StableDiffusion(str(broken))


def test_a_prediction_that_cannot_be_trained_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "sample"
    shutil.copytree(tiny_folder, other)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(InputError, match="cannot be trained"):
        StableDiffusion(str(other))


def test_a_unet_of_another_family_is_refused(tiny_folder: str, tiny_xl_folder: str) -> None:
    with pytest.raises(InputError, match="cross_attention_dim 56 where .* need 32"):
        StableDiffusion(tiny_folder, denoiser=f"{tiny_xl_folder}/unet")
    with pytest.raises(InputError, match="is a StableDiffusionXLPipeline and not"):
        StableDiffusion(tiny_xl_folder)


def test_an_inpainting_unet_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(InputError, match="9 input channels and 4 output channels"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize(
    ("prediction", "unet"),
    [
        ("epsilon", {}),
        ("v_prediction", {"use_linear_projection": True}),  # as Stable Diffusion 2.1
        ("epsilon", {"time_cond_proj_dim": 16}),  # as guidance-distilled models
    ],
    ids=["1.x", "2.x", "distilled"],
)
def test_images_are_the_stock_pipelines(
    prediction: str, unet: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_pipeline(tmp_path / "tiny", prediction, **unet)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    seeds, how = torch.tensor([5]), Sampling(steps=4, guidance=3.0)
    theirs = stock(
        "a cat",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=draws.normal(seeds, (4, 8, 8), "start"),
        output_type="pt",
    ).images
    ours = sample(StableDiffusion(str(folder)), ["a cat"], seeds, how)
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-4, rtol=1e-4)


def test_a_distilled_unet_is_told_the_guidance(tmp_path: Path) -> None:
    folder = str(tiny_pipeline(tmp_path / "tiny", time_cond_proj_dim=16))
    backbone = StableDiffusion(folder, guidance=4.0)
    inputs, prompt = (torch.randn(2, 4, 8, 8), torch.tensor([3, 900])), backbone.embed(["a", "b"])
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    told = stock.get_guidance_scale_embedding(torch.full((2,), 3.0), 16)
    theirs = stock.unet(*inputs, prompt["hidden"], timestep_cond=told).sample
    torch.testing.assert_close(backbone.predict(*inputs, prompt), theirs, atol=1e-5, rtol=1e-4)
    other = backbone.predict(*inputs, prompt.replace(guidance=torch.tensor([4.0, 9.0])))
    torch.testing.assert_close(other[0], theirs[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other[1], theirs[1], atol=1e-3)


def test_a_prediction_that_the_checkpoint_states_wrongly(tiny_folder: str) -> None:
    assert StableDiffusion(tiny_folder).process.prediction == "epsilon"
    stated = StableDiffusion(tiny_folder, prediction="v_prediction")
    assert stated.process.prediction == "v_prediction"


def test_the_error_of_v_is_the_converted_error_of_epsilon(tmp_path: Path) -> None:
    """x_t and v tell the noise: eps = sqrt(1 - abar) x_t + sqrt(abar) v."""
    backbone = StableDiffusion(str(tiny_pipeline(tmp_path / "v", "v_prediction")))
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0)
    pairs = module.form_pairs(image_pairs(6))
    noised = module.add_noise(pairs)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[noised.t].view(-1, 1, 1, 1, 1)
    x = noised.latents.unflatten(0, (6, 2)).double()
    v = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    noise = draws.normal(pairs.seeds, (4, 8, 8), "noise")[:, None].double()
    epsilon = (1 - abar).sqrt() * x + abar.sqrt() * v.unflatten(0, (6, 2)).double()
    of_epsilon = (epsilon - noise).square().mean((2, 3, 4))
    torch.testing.assert_close(
        module.errors(noised).value.double() * abar.view(-1, 1), of_epsilon, atol=1e-5, rtol=1e-4
    )

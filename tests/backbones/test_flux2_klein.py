"""FLUX.2 klein base against the stock diffusers pipeline, and what is its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import Tensor

from lit_prefopt.backbones import Flux2Klein, LoRA, StableDiffusion3, trained
from lit_prefopt.backbones.flux2_klein import token_ids
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.families.cases import load_stock
from tests.helpers.batches import image_pairs
from tests.helpers.flow_backbones import adapter_gradients, changed, noised
from tests.helpers.tiny_flux2 import (
    tiny_flux2_pipeline,
    tiny_flux2_transformer,
    tiny_flux2_vae,
    tiny_qwen,
    tiny_qwen_tokenizer,
)
from tests.methods.test_flow_methods import check_step_zero

SHAPE = 128, 4, 3  # of latents of 64 x 48 pixels
TEXTS = ["a red cat", "", "dog " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_flux2_pipeline(tmp_path_factory.mktemp("flux2")))


@pytest.fixture(scope="module")
def backbone(folder: str) -> Flux2Klein:
    return Flux2Klein(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> Flux2KleinPipeline:
    pipeline: Flux2KleinPipeline = load_stock(Path(folder))
    return pipeline


@pytest.fixture
def copied(folder: str, tmp_path: Path) -> Callable[..., str]:
    """Copies the pipeline, with changed entries of its model_index.json."""
    return partial(changed, folder, tmp_path / "copy")


def images(height: int = 64, width: int = 48) -> Tensor:
    """Return two images."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, height, width, generator=generator) * 2 - 1


# Prompts, latents, levels ---------------------------------------------------------------------


@torch.no_grad()
def test_prompts_are_the_stock_pipelines(backbone: Flux2Klein, stock: Flux2KleinPipeline) -> None:
    """Padding is no zeros, and a long prompt is cut."""
    theirs, ids = stock.encode_prompt(TEXTS)
    ours = backbone.embed(TEXTS)["hidden"]
    assert ours.shape == (3, 512, 3 * 16)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours[1, -1].abs().max() > 1e-3
    assert torch.equal(token_ids(1, 1, 512, ours.device).expand(3, -1, -1), ids)


def test_prompts_beyond_the_encoders_length(backbone: Flux2Klein) -> None:
    """The template takes some of the 512 tokens; a letter is one."""
    around = len(backbone.tokenizer(backbone.texts["text_encoder"].message("")).input_ids)
    assert around > 20
    most = 512 - around
    assert [backbone.fits_context("a" * n) for n in (most, most + 1)] == [True, False]


@torch.no_grad()
def test_latents_of_images_are_the_stock_pipelines(
    backbone: Flux2Klein, stock: Flux2KleinPipeline
) -> None:
    """The mode of the distribution, in squares, normalised by the statistics."""
    mean, deviation = backbone.encode(images())
    torch.testing.assert_close(mean, stock._encode_vae_image(images(), None), atol=1e-5, rtol=0)
    assert mean.shape == (2, 128, 4, 3)
    assert not deviation.any()
    own, _ = backbone.posterior(images())
    assert (own - mean).abs().max() > 0.1
    torch.testing.assert_close(backbone.unscaled(mean), own, atol=1e-5, rtol=0)
    assert torch.equal(
        backbone.scaled_deviation(torch.ones_like(own)), 1 / backbone.latent_std + 0 * own
    )


@torch.no_grad()
def test_latents_decode_to_the_vaes_own_images(
    backbone: Flux2Klein, stock: Flux2KleinPipeline
) -> None:
    mean, _ = backbone.encode(images())
    rebuilt = stock.vae.decode(stock.vae.encode(images()).latent_dist.mode()).sample
    torch.testing.assert_close(backbone.decode(mean), rebuilt.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("size", [(64, 64), (128, 80)])
def test_levels_are_those_of_the_stock_pipeline(
    folder: str, steps: int, size: tuple[int, int]
) -> None:
    height, width = size
    pipeline = load_stock(Path(folder))
    pipeline(
        prompt="a",
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent",
        guidance_scale=1.0,
    )
    backbone = Flux2Klein(folder, reference="none", encoders=False)
    ours = backbone.process.sampler(Sampling(steps), (128, height // 16, width // 16)).levels
    assert torch.equal(ours.float(), pipeline.scheduler.sigmas)


def test_levels_of_a_megapixel(backbone: Flux2Klein) -> None:
    """Levels that the stock pipeline had at 1024 x 1024 pixels."""
    shape = backbone.latent_shape
    assert shape == (128, 64, 64)
    levels = backbone.process.sampler(Sampling(50), shape).levels
    found = [levels[i].item() for i in (1, 25, 49)]
    assert found == pytest.approx([0.99731, 0.88323, 0.13372], abs=1e-5)
    few = backbone.process.sampler(Sampling(4), shape).levels
    assert few.tolist() == pytest.approx([1, 0.96738, 0.90814, 0.76720, 0], abs=1e-5)


def test_the_draw_in_training_has_the_shift_of_fifty_steps(backbone: Flux2Klein) -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    drawn = backbone.process.draw_levels(half, (128, 64, 64)).item()
    assert drawn == pytest.approx(1 / (1 + math.exp(-2.0234)), abs=1e-5)


def test_its_defaults(backbone: Flux2Klein) -> None:
    assert backbone.sampling == Sampling(50, 4.0, batch_size=4)
    assert not backbone.takes_guidance
    assert (backbone.pixels_per_latent, backbone.size_multiple) == (16, 16)
    settings = backbone.latent_settings()
    assert (settings["text"], settings["tokens"]) == ({"hidden": 48}, 512)
    assert (settings["latent_channels"], settings["pixels_per_latent"]) == (128, 16)


# Statistics of the VAE ------------------------------------------------------------------------


def test_statistics_are_read_without_encoders(folder: str, backbone: Flux2Klein) -> None:
    alone = Flux2Klein(folder, reference="none", encoders=False)
    assert alone.vae is None
    assert alone.encoders == {}
    assert alone.latent_settings() == backbone.latent_settings()
    own, _ = backbone.posterior(images())
    assert torch.equal(alone.scaled(own), backbone.scaled(own))
    assert not any("latent_" in name for name in alone.state_dict())


def test_a_vae_with_other_statistics_has_another_fingerprint(
    folder: str, backbone: Flux2Klein, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    tiny_flux2_vae().save_pretrained(tmp_path)
    other = Flux2Klein(folder, reference="none", vae=str(tmp_path), encoders=False)
    ours, theirs = backbone.latent_settings(), other.latent_settings()
    assert {name for name in ours if ours[name] != theirs[name]} == {"batch_norm"}


@pytest.mark.parametrize("encoders", [True, False])
def test_a_vae_without_statistics_is_refused(folder: str, tmp_path: Path, encoders: bool) -> None:
    vae = AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae")
    vae.bn.running_var[3] = 0
    vae.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"variances .* not above 0 .bn.running_var.*backbone.vae"):
        Flux2Klein(folder, vae=str(tmp_path), encoders=encoders)


def test_statistics_have_the_vaes_precision(folder: str) -> None:
    """As in the stock pipeline, with and without encoders, so that both train alike."""
    options = {"reference": "none", "dtype": "bfloat16", "lora": LoRA(2)}
    with_vae, without = (Flux2Klein(folder, encoders=is_so, **options) for is_so in (True, False))
    mean = with_vae.vae.bn.running_mean
    assert mean.dtype == torch.bfloat16
    assert torch.equal(with_vae.latent_mean.flatten(), mean.float())
    assert torch.equal(with_vae.latent_mean, without.latent_mean)
    assert torch.equal(with_vae.latent_std, without.latent_std)


def test_a_vae_in_float16(folder: str) -> None:
    backbone = Flux2Klein(folder, reference="none", dtype="float16", lora=LoRA(2))
    assert backbone.latent_dtype == torch.float16


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_zero(folder: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    backbone = Flux2Klein(folder, lora=LoRA(4), gradient_checkpointing=checkpointing)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=2000.0).train()
    check_step_zero(module, module.form_pairs(image_pairs()), torch.full((3,), math.log(2)))


def test_the_adapter_has_the_layers_of_diffusers_script(folder: str) -> None:
    """`attn.to_out` is a layer in single blocks, and in double ones a list, which has none."""
    backbone = Flux2Klein(folder, lora=LoRA(4))
    layers = {name.split(".lora_")[0] for name in trained(backbone.policy.denoiser)}
    double = {f"transformer_blocks.0.attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")}
    single = {
        f"single_transformer_blocks.{i}.attn.{x}"
        for i in (0, 1)
        for x in ("to_qkv_mlp_proj", "to_out")
    }
    assert layers == double | single


def gradients(folder: str, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of a LoRA that is not the identity."""
    return adapter_gradients(
        Flux2Klein(folder, lora=LoRA(4), **options), TEXTS[:2], *noised(shape=SHAPE)
    )


def test_gradients_are_equal_with_checkpointing(folder: str) -> None:
    plain, saved = gradients(folder), gradients(folder, gradient_checkpointing=True)
    assert len(plain) == 2 * 8
    assert all(x.isfinite().all() and x.any() for x in plain.values())
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_training_after_sampling(folder: str) -> None:
    backbone = Flux2Klein(folder, lora=LoRA(2))
    (latents, t), prompt = noised(shape=SHAPE), backbone.embed(TEXTS[:2])
    with torch.inference_mode():
        backbone.predict(latents.clone(), t.clone(), prompt)
    backbone.predict(latents, t, prompt).mean().backward()
    assert token_ids(4, 3, 1, latents.device)[0].tolist()[:4] == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 2, 0],
        [0, 1, 0, 0],
    ]


# Refusals -------------------------------------------------------------------------------------


def test_a_distilled_model_is_refused(copied: Callable[..., str]) -> None:
    distilled = copied(is_distilled=True)
    sentence = "few steps .its model_index.json has is_distilled.*undoes the distillation.*true"
    with pytest.raises(InputError, match=sentence) as error:
        Flux2Klein(distilled)
    assert "\n" not in str(error.value)
    assert Flux2Klein(distilled, reference="none", distilled=True).latent_shape[0] == 128


def test_pipelines_of_other_families_are_refused(
    folder: str, tiny_sd3_folder: str, copied: Callable[..., str]
) -> None:
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not a Flux2KleinP"):
        Flux2Klein(tiny_sd3_folder)
    with pytest.raises(InputError, match="is a Flux2KleinPipeline and not a StableDiffusion3P"):
        StableDiffusion3(folder)
    with pytest.raises(InputError, match="is a Flux2Pipeline and not a Flux2KleinPipeline"):
        Flux2Klein(copied(_class_name="Flux2Pipeline"))  # FLUX.2 dev
    with pytest.raises(InputError, match="transformer of .* is a SD3Transformer2DModel"):
        Flux2Klein(folder, denoiser=f"{tiny_sd3_folder}/transformer")
    with pytest.raises(InputError, match="vae of .* is a AutoencoderKL and not a AutoencoderKLF"):
        Flux2Klein(folder, vae=f"{tiny_sd3_folder}/vae")


@pytest.mark.parametrize(
    ("name", "value"),
    [("joint_attention_dim", 64), ("out_channels", 64), ("guidance_embeds", True)],
)
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, name: str, value: object
) -> None:
    tiny_flux2_transformer(**{name: value}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has {name} {value} where Flux2Klein"):
        Flux2Klein(folder, denoiser=str(tmp_path))


def test_a_vae_of_other_channels_is_refused(folder: str, tmp_path: Path) -> None:
    tiny_flux2_vae(latent_channels=16).save_pretrained(tmp_path)
    for encoders in (True, False):
        with pytest.raises(InputError, match="has 16 latent channels and the denoiser 32"):
            Flux2Klein(folder, vae=str(tmp_path), encoders=encoders)


def test_a_tokenizer_without_a_chat_template_is_refused(copied: Callable[..., str]) -> None:
    without = copied()
    tokenizer = tiny_qwen_tokenizer(template=None)
    shutil.rmtree(f"{without}/tokenizer")
    tokenizer.save_pretrained(f"{without}/tokenizer")
    with pytest.raises(InputError, match="has no chat template, .* copy chat_template.jinja"):
        Flux2Klein(without)
    assert not Flux2Klein(without, reference="none", encoders=False).has_encoders


def test_a_text_encoder_of_too_few_layers_is_refused(copied: Callable[..., str]) -> None:
    shallow = copied()
    shutil.rmtree(f"{shallow}/text_encoder")
    tiny_qwen(tiny_qwen_tokenizer(), layers=4).save_pretrained(f"{shallow}/text_encoder")
    with pytest.raises(InputError, match="has 4 layers and Flux2Klein needs hidden state 27"):
        Flux2Klein(shallow)


def test_sizes_that_are_no_whole_tokens_are_refused(backbone: Flux2Klein) -> None:
    with pytest.raises(InputError, match="a multiple of 16"):
        backbone.posterior(torch.zeros(1, 3, 72, 64))
    with pytest.raises(InputError, match="a multiple of 16"):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=72))


def test_a_guidance_scale_in_the_prompts_is_refused(backbone: Flux2Klein) -> None:
    (latents, t), prompt = noised(shape=SHAPE), backbone.embed(TEXTS[:2])
    with pytest.raises(InputError, match="Flux2Klein is not conditioned on"):
        backbone.predict(latents, t, prompt.replace(guidance=torch.ones(2)))

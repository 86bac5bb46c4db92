"""Qwen-Image against the stock diffusers pipeline: prompts, latents, levels, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageImg2ImgPipeline, QwenImagePipeline
from safetensors import safe_open

from lit_prefopt.backbones import LoRA, QwenImage, StableDiffusion3, trained
from lit_prefopt.backbones.qwen_image import with_length_of_prompted
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.families.cases import LONG, load_stock
from tests.helpers.batches import image_pairs
from tests.helpers.flow_backbones import changed, noised
from tests.helpers.tiny_qwen_image import (
    tiny_qwen_image_pipeline,
    tiny_qwen_transformer,
    tiny_qwen_vae,
)

TEXTS = ["a red cat", "two {braces} and a dog", LONG, LONG * 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_qwen_image_pipeline(tmp_path_factory.mktemp("qwen-image") / "whole"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a pipeline whose latents are 4 pixels wide."""
    return str(tiny_qwen_image_pipeline(tmp_path_factory.mktemp("qwen-image") / "small", factor=4))


@pytest.fixture(scope="module")
def backbone(folder: str) -> QwenImage:
    return QwenImage(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> DiffusionPipeline:
    return load_stock(Path(folder))


# Against the stock pipeline ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("most", [512, 100, 1024])
def test_prompts_are_the_stock_pipelines(folder: str, stock: DiffusionPipeline, most: int) -> None:
    """Padded to the longest they are the stock pipeline's, and no padding is kept."""
    backbone = QwenImage(folder, reference="none", text_tokens=most)
    theirs, mask = stock.encode_prompt(TEXTS, max_sequence_length=most)
    ours = backbone.embed(TEXTS).ragged("hidden")
    rows, own = ours.padded()
    torch.testing.assert_close(rows, theirs, atol=1e-5, rtol=0)
    if mask is None:
        assert own.all()
    else:
        assert torch.equal(own.long(), mask)
    assert max(ours.lengths) == most
    assert backbone.latent_settings()["tokens"] == most
    for row, text in zip(ours, TEXTS, strict=True):
        [alone] = backbone.embed([text]).ragged("hidden")
        torch.testing.assert_close(alone, row, atol=1e-5, rtol=0)


def test_padding_on_the_left_is_cut_as_well(backbone: QwenImage) -> None:
    tokenizer = backbone.texts["text_encoder"].tokenizer
    expected = backbone.embed(TEXTS[:2]).ragged("hidden")
    tokenizer.padding_side = "left"
    found = backbone.embed(TEXTS[:2]).ragged("hidden")
    tokenizer.padding_side = "right"
    assert found.lengths == expected.lengths
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)


def test_an_empty_prompt_is_that_of_guidance(backbone: QwenImage, stock: DiffusionPipeline) -> None:
    """A dropped caption is " ", which the stock pipeline is usually guided away from."""
    space, _ = stock.encode_prompt(" ")
    for prompt in (backbone.empty, backbone.embed([""])):
        torch.testing.assert_close(prompt.ragged("hidden").values[None], space, atol=1e-5, rtol=0)


def test_prompts_beyond_the_encoders_length_are_counted(folder: str) -> None:
    backbone = QwenImage(folder, reference="none", text_tokens=200)
    encoder = backbone.texts["text_encoder"]
    letters = 200 + encoder.beginning - len(encoder.tokenizer(encoder.template).input_ids) + 2
    assert backbone.fits_context("a" * letters)
    assert not backbone.fits_context("a" * (letters + 1))
    assert backbone.embed(["a" * letters]).ragged("hidden").lengths == (200,)


@torch.no_grad()
@pytest.mark.parametrize("factor", [4, 8])
def test_latents_are_normalized_channel_by_channel(
    factor: int, folder: str, small: str, stock: DiffusionPipeline
) -> None:
    backbone = QwenImage({4: small, 8: folder}[factor], reference="none")
    assert backbone.pixels_per_latent == factor
    assert backbone.size_multiple == 2 * factor
    vae = backbone.vae
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, deviation = backbone.encode(images)
    assert mean.shape == deviation.shape == (2, 16, 32 // factor, 48 // factor)
    posterior = vae.encode(images[:, :, None]).latent_dist
    means = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    deviations = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    assert deviations.unique().numel() == 16
    expected = ((posterior.mean - means) * (1 / deviations))[:, :, 0]
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, (posterior.std / deviations)[:, :, 0])
    torch.testing.assert_close(backbone.unscaled(mean), posterior.mean[:, :, 0])
    rebuilt = vae.decode(posterior.mean).sample[:, :, 0]
    torch.testing.assert_close(backbone.decode(mean), rebuilt, atol=1e-5, rtol=0)
    own = backbone.posterior(images)
    torch.testing.assert_close(backbone.scaled(own[0]), mean)
    assert torch.equal(backbone.scaled_deviation(own[1]), deviation)
    settings = json.loads(json.dumps(backbone.latent_settings()))
    assert settings == backbone.latent_settings()
    assert settings["latents_std"] == list(vae.config.latents_std)


@torch.no_grad()
def test_latents_are_those_of_the_image_to_image_pipeline(backbone: QwenImage, folder: str) -> None:
    """Its latents before noise, with the mean in place of a draw."""
    stock = QwenImageImg2ImgPipeline.from_pretrained(folder)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    torch.manual_seed(1)
    theirs = stock._encode_vae_image(images[:, :, None], torch.Generator().manual_seed(1))[:, :, 0]
    mean, deviation = backbone.encode(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mean + deviation * noise, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "steps"), [(64, 4), (64, 7), (128, 4), (128, 7)])
def test_levels_are_the_stock_schedulers(
    backbone: QwenImage, stock: DiffusionPipeline, side: int, steps: int
) -> None:
    stock("a", height=side, width=side, num_inference_steps=steps, output_type="latent")
    shape = (16, side // 8, side // 8)
    sampler = backbone.process.sampler(Sampling(steps=steps, guidance=1.0), shape)
    assert torch.equal(sampler.sigmas, stock.scheduler.sigmas)


def test_levels_of_published_settings(backbone: QwenImage) -> None:
    levels = {
        n: backbone.process.sampler(Sampling(steps=n, guidance=1.0), (16, 128, 128)).levels
        for n in (4, 50)
    }
    torch.testing.assert_close(
        levels[4].float(), torch.tensor([1, 0.76671, 0.45561, 0.02, 0]), atol=1e-5, rtol=0
    )
    assert [round(float(levels[50][i]), 5) for i in (1, 25, 49)] == [0.9897, 0.66009, 0.02]
    assert backbone.process.shift((16, 128, 128)) == pytest.approx(math.exp(0.6935), abs=1e-3)
    with pytest.raises(InputError, match="set `steps` of the sampling to 2 or more"):
        backbone.process.sampler(Sampling(steps=1, guidance=1.0), (16, 8, 8))


def test_guidance_keeps_the_length_of_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    prompted, without = torch.randn(2, 3, 16, 4, 6, generator=generator)
    assert torch.equal(with_length_of_prompted(prompted, prompted, 4.0), prompted)
    found = with_length_of_prompted(prompted, without, 4.0)
    plain = without + 4 * (prompted - without)
    for row, column in ((0, 0), (1, 2)):
        square = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        ratio = prompted[square].flatten(1).norm(dim=1) / plain[square].flatten(1).norm(dim=1)
        torch.testing.assert_close(found[square], plain[square] * ratio.view(-1, 1, 1, 1))


def test_a_mask_only_where_lengths_differ(folder: str) -> None:
    backbone = QwenImage(folder, lora=LoRA(2), dtype="bfloat16").eval()
    seen: dict[str, Any] = {}
    backbone.policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    latents, t = noised()
    both = backbone.predict(latents, t, backbone.embed(["a cat", "a long cat"]))
    assert seen["encoder_hidden_states_mask"].dtype == torch.int64
    assert seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["img_shapes"] == [[(1, 4, 4)]] * 2
    alone = backbone.predict(latents[:1], t[:1], backbone.embed(["a cat"]))
    assert seen["encoder_hidden_states_mask"] is None
    torch.testing.assert_close(both[:1], alone, atol=0.05, rtol=0)


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_zero(folder: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    lora = LoRA(4, targets=["attn.to_q", "attn.to_add_out", "txt_mlp.net.2"])
    backbone = QwenImage(folder, lora=lora, gradient_checkpointing=checkpointing)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=100.0).train()
    pairs = module.form_pairs(image_pairs())
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    losses = module.losses(ratios, pairs)
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)))
    losses.mean().backward()
    gradients = [weight.grad for weight in trained(backbone).values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def test_layers_that_reach_no_image_are_not_trained(folder: str) -> None:
    """DDP would wait for their gradients."""
    latents, t = noised()
    lora = LoRA(4, targets=["attn.add_q_proj", "attn.to_q", "attn.to_add_out", "txt_mlp.net.2"])
    for options in ({"lora": lora}, {}):
        backbone = QwenImage(folder, **options).train()
        weights = trained(backbone)
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(0.1)
        backbone.predict(latents, t, backbone.embed(TEXTS[:2])).square().mean().backward()
        assert not {name for name, x in weights.items() if x.grad is None or not x.grad.any()}
    last = "transformer_blocks.1."
    frozen = {
        name for name, x in backbone.policy.denoiser.named_parameters() if not x.requires_grad
    }
    ends = {name.removeprefix(last).rsplit(".", 1)[0] for name in frozen}
    names = {"add_q_proj", "norm_added_q", "to_add_out"}
    assert ends == {f"attn.{name}" for name in names} | {"txt_mlp.net.0.proj", "txt_mlp.net.2"}
    with torch.no_grad():
        before = backbone.predict(latents, t, backbone.embed(TEXTS[:2]))
        for name, weight in backbone.policy.denoiser.named_parameters():
            if name in frozen:
                weight.normal_()
        assert torch.equal(backbone.predict(latents, t, backbone.embed(TEXTS[:2])), before)


def test_a_lora_without_them_is_loaded_without_a_warning(
    folder: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    backbone = QwenImage(folder, lora=LoRA(4, alpha=8))
    with torch.no_grad():
        for weight in trained(backbone).values():
            weight.normal_(std=0.1)
    file = backbone.save(tmp_path)
    with safe_open(file, "pt") as opened:
        names, metadata = {*opened.keys()}, opened.metadata()
    assert "transformer.transformer_blocks.0.attn.to_add_out.lora_A.weight" in names
    assert "transformer.transformer_blocks.1.attn.to_add_out.lora_A.weight" not in names
    assert '"transformer.lora_alpha": 8' in metadata["lora_adapter_metadata"]
    stock = QwenImagePipeline.from_pretrained(folder)
    recwarn.clear()
    stock.load_lora_weights(str(file))
    assert not [str(one.message) for one in recwarn if "modules" in str(one.message)]
    started = QwenImage(folder, start_lora=str(file), reference="none").eval()
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with torch.no_grad():
        ours = backbone.eval().predict(latents, t, prompt)
        torch.testing.assert_close(started.predict(latents, t, prompt), ours, atol=1e-5, rtol=1e-5)


def test_without_encoders_latents_are_scaled_by_the_configuration(
    folder: str, backbone: QwenImage
) -> None:
    without = QwenImage(folder, reference="none", encoders=False)
    assert without.encoders == {}
    means = torch.randn(1, 16, 2, 2)
    assert torch.equal(without.scaled(means), backbone.scaled(means))
    assert without.latent_settings() == backbone.latent_settings()


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"]
    + ["QwenImage21Pipeline", "FluxPipeline"],
)
def test_pipelines_of_other_families_are_refused(folder: str, tmp_path: Path, name: str) -> None:
    other = changed(folder, tmp_path / "other", "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=f"is a {name} and not a QwenImagePipeline"):
        QwenImage(other)


def test_other_backbones_refuse_it(folder: str, tiny_sd3_folder: str) -> None:
    with pytest.raises(InputError, match="is a QwenImagePipeline and not"):
        StableDiffusion3(folder)
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not a QwenImage"):
        QwenImage(tiny_sd3_folder)
    with pytest.raises(InputError, match="is a SD3Transformer2DModel and not"):
        QwenImage(folder, denoiser=f"{tiny_sd3_folder}/transformer")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("joint_attention_dim", 24),
        ("zero_cond_t", True),
        ("use_additional_t_cond", True),
        ("use_layer3d_rope", True),
        ("guidance_embeds", True),
    ],
)
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, name: str, value: object
) -> None:
    """Those of editing and of layers among them."""
    tiny_qwen_transformer(**{name: value}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has {name} {value} where QwenImage"):
        QwenImage(folder, denoiser=str(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_qwen_vae(z_dim=8), "numbers in latents_mean"),
        (lambda: tiny_qwen_vae(z_dim=1, latents_mean=[0], latents_std=[1]), "1 latent channels"),
        (lambda: tiny_qwen_vae(latents_std=[0.0] * 16), "a deviation above 0"),
    ],
)
def test_vaes_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, make: Callable[[], Any], message: str
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        QwenImage(folder, vae=str(tmp_path))


def test_sizes_that_are_no_whole_tokens_are_refused(backbone: QwenImage) -> None:
    with pytest.raises(InputError, match="a multiple of 16"):
        backbone.posterior(torch.zeros(1, 3, 40, 32))
    with pytest.raises(InputError, match="a multiple of 16"):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=2, width=40))


def test_prompts_that_do_not_fit_are_refused(backbone: QwenImage) -> None:
    latents, t = noised()
    prompt = backbone.embed(TEXTS[:2])
    with pytest.raises(InputError, match="QwenImage is not conditioned on"):
        backbone.predict(latents, t, prompt.replace(guidance=torch.ones(2)))
    with pytest.raises(InputError, match="rows of one length"):
        backbone.predict(latents, t, Prompt({"hidden": torch.zeros(2, 7, 16)}))


@pytest.mark.parametrize("tokens", [0, 1025])
def test_numbers_of_tokens_that_are_refused(folder: str, tokens: int) -> None:
    with pytest.raises(InputError, match=f"text_tokens is {tokens}"):
        QwenImage(folder, text_tokens=tokens)


def test_channels_last_and_float16(folder: str) -> None:
    """The VAE's convolutions are of videos, in one memory format."""
    backbone = QwenImage(
        folder, lora=LoRA(2), reference="none", channels_last=True, dtype="float16"
    )
    seeds = torch.tensor([1])
    noise = draws.normal(seeds, backbone.sampling_shape(Sampling(height=32, width=32)), "start")
    assert backbone.decode(noise).isfinite().all()

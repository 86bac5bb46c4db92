"""FLUX.1 against the stock diffusers pipelines, and what is its own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor

from lit_prefopt.backbones import Flux1, LoRA, StableDiffusion3, trained
from lit_prefopt.backbones.packing import unpack
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.models import load_model
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.flow_backbones import adapter_gradients, changed, noised
from tests.helpers.recorder import Recorder
from tests.helpers.tiny_flux1 import (
    tiny_flux1_pipeline,
    tiny_flux1_schnell_pipeline,
    tiny_flux1_transformer,
)
from tests.methods.test_flow_methods import check_step_zero

TEXTS = ["a red cat", "", "dog " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_flux1_pipeline(tmp_path_factory.mktemp("flux1")))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_flux1_schnell_pipeline(tmp_path_factory.mktemp("schnell")))


@pytest.fixture(scope="module")
def backbone(folder: str) -> Flux1:
    return Flux1(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guidance_seen(backbone: Flux1, **prompt: Any) -> Tensor | None:
    """Return what the transformer gets as guidance in training."""
    (latents, t), texts = noised(), backbone.embed(TEXTS[:2])
    with Recorder({"transformer": (backbone.policy.net, "forward")}) as record, torch.no_grad():
        backbone.predict(latents, t, texts.replace(**prompt))
    return record.calls[0].arguments["guidance"]


# Prompts, latents, levels ---------------------------------------------------------------------


@torch.no_grad()
def test_prompts_are_the_stock_pipelines(backbone: Flux1, stock: FluxPipeline) -> None:
    hidden, pooled, _ = stock.encode_prompt(TEXTS)
    ours = backbone.embed(TEXTS)
    assert ours["hidden"].shape == (3, 512, 64)
    torch.testing.assert_close(ours["hidden"], hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["pooled"], pooled, atol=1e-5, rtol=0)
    assert ours["pooled"].shape == (3, 32)


@torch.no_grad()
def test_the_number_of_t5s_tokens(folder: str, stock: FluxPipeline) -> None:
    """T5 alone decides whether a prompt is read whole: CLIP only adds a pooled vector."""
    short = Flux1(folder, reference="none", text_tokens=40)
    hidden, _, _ = stock.encode_prompt(TEXTS, max_sequence_length=40)
    torch.testing.assert_close(short.embed(TEXTS)["hidden"], hidden, atol=1e-5, rtol=0)
    assert short.latent_settings()["tokens"] == 40
    # a letter is a token; beside it stand T5's word mark and end
    assert [short.fits_context("a" * n) for n in (38, 39)] == [True, False]
    whole = Flux1(folder, reference="none")
    assert [whole.fits_context("a" * n) for n in (100, 510, 511)] == [True, True, False]


@torch.no_grad()
def test_latents_of_images_are_those_of_the_stock_img2img_pipeline(
    backbone: Flux1, stock: FluxPipeline
) -> None:
    from_images = FluxImg2ImgPipeline.from_pipe(stock)
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = backbone.encode(images)
    for seed in (0, 1):
        theirs = from_images._encode_vae_image(images, torch.Generator().manual_seed(seed))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mean + deviation * noise, theirs, atol=1e-5, rtol=0)
    assert mean.shape == (2, 16, 8, 10)


@pytest.mark.parametrize("name", ["folder", "schnell"])
@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("size", [(32, 32), (64, 40)])
def test_levels_are_those_of_the_stock_pipeline(
    name: str, steps: int, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    height, width = size
    pipeline("a", num_inference_steps=steps, height=height, width=width, output_type="latent")
    backbone = Flux1(folder, reference="none", distilled=True, encoders=False)
    shape = (16, height // 4, width // 4)
    ours = backbone.process.sampler(Sampling(steps), shape).levels
    assert torch.equal(ours.float(), pipeline.scheduler.sigmas)


@pytest.mark.parametrize(
    ("pixels", "second", "last"), [(256, 0.97803, 0.05755), (1024, 0.98841, 0.10472)]
)
def test_levels_of_28_steps_of_the_published_shift(
    backbone: Flux1, pixels: int, second: float, last: float
) -> None:
    """Levels that the stock pipeline had at these sizes, with a VAE of eight pixels per latent."""
    levels = backbone.process.sampler(Sampling(28), (16, pixels // 8, pixels // 8)).levels
    assert [levels[1].item(), levels[-2].item()] == pytest.approx([second, last], abs=1e-5)


def test_the_draw_in_training_has_the_shift_of_the_resolution(backbone: Flux1) -> None:
    """The median level is exp(mu) / (1 + exp(mu)), with mu on the published line."""
    half = torch.tensor([0.5], dtype=torch.float64)
    for side, mu in ((32, 0.5), (128, 1.15)):
        drawn = backbone.process.draw_levels(half, (16, side, side)).item()
        assert drawn == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), abs=1e-9)


# Guidance -------------------------------------------------------------------------------------


def test_guidance_in_training_and_in_sampling(folder: str, backbone: Flux1) -> None:
    """1 by default; the sampling's own value in a roll-out; both change the prediction."""
    assert backbone.takes_guidance
    assert backbone.sampling == Sampling(28, 3.5, batch_size=4)
    other = Flux1(folder, reference="none", guidance=3.5).eval()
    assert torch.equal(guidance_seen(backbone), torch.ones(2))
    assert torch.equal(guidance_seen(other), torch.full((2,), 3.5))
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with torch.no_grad():
        as_sampled = guided(backbone, latents, t, prompt, 3.5)
        assert torch.equal(as_sampled, other.predict(latents, t, prompt))
        assert not torch.equal(as_sampled, backbone.predict(latents, t, prompt))
    assert (
        backbone.reference_settings()["guidance"],
        other.reference_settings()["guidance"],
    ) == (1.0, 3.5)


def test_an_embedded_guidance_scale_holds_for_all_steps(backbone: Flux1) -> None:
    with pytest.raises(InputError, match="set `sampling.guided` to 1"):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(2, 3.5, guided=0.5))


def test_a_model_without_guidance_embedding_is_guided_without_a_classifier(schnell: str) -> None:
    backbone = Flux1(schnell, reference="none", distilled=True).eval()
    assert not backbone.takes_guidance
    assert guidance_seen(backbone) is None
    assert backbone.sampling == Sampling(4, 1.0, batch_size=4)
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with torch.no_grad():
        with_prompt = backbone.predict(latents, t, prompt)
        without = backbone.predict(latents, t, backbone.empty.repeat(2))
        expected = without + 4 * (with_prompt - without)
        assert torch.equal(guided(backbone, latents, t, prompt, 4.0), expected)
    with pytest.raises(InputError, match="have a guidance scale, which Flux1 is not conditioned"):
        backbone.predict(latents, t, prompt.replace(guidance=torch.ones(2)))
    with pytest.raises(InputError, match="no guidance embedding: leave out `--backbone.guidance`"):
        Flux1(schnell, distilled=True, guidance=3.5)


def test_a_reference_takes_the_guidance_that_it_was_trained_for(folder: str, schnell: str) -> None:
    backbone = Flux1(folder, reference=f"{schnell}/transformer", distilled=True)
    with backbone.as_reference():
        assert guidance_seen(backbone, guidance=torch.full((2,), 3.5)) is None
    assert torch.equal(guidance_seen(backbone), torch.ones(2))


def test_places_of_tokens_are_rounded_as_the_stock_pipelines(folder: str) -> None:
    """In bfloat16 rows from 256 on are not all distinct, in training as in sampling."""
    backbone = Flux1(folder, reference="none", dtype="bfloat16", lora=LoRA(2)).eval()
    latents = torch.randn(1, 16, 600, 2, generator=torch.Generator().manual_seed(0))
    level, prompt = torch.ones(1, dtype=torch.float64), backbone.embed(["a"])
    with Recorder({"transformer": (backbone.policy.net, "forward")}) as record, torch.no_grad():
        backbone.predict(latents, level, prompt)
    ours = record.calls[0].arguments["img_ids"]
    theirs = FluxPipeline._prepare_latent_image_ids(1, 300, 1, latents.device, torch.bfloat16)
    assert torch.equal(ours, theirs)
    assert len(ours.unique(dim=0)) < 300


# Distilled models -----------------------------------------------------------------------------


def test_a_distilled_model_is_refused(folder: str, schnell: str) -> None:
    """By its configuration, wherever the transformer comes from."""
    sentence = "distilled to sample in few steps .its transformer has no guidance.*undoes.*true"
    with pytest.raises(InputError, match=sentence):
        Flux1(schnell)
    with pytest.raises(InputError, match=sentence):
        Flux1(folder, denoiser=f"{schnell}/transformer")
    with_dev = Flux1(schnell, denoiser=f"{folder}/transformer", reference="none")
    assert with_dev.takes_guidance
    assert not Flux1(schnell, distilled=True, reference="none").takes_guidance


def test_a_distilled_model_is_refused_before_its_weights_are_read(
    schnell: str, tmp_path: Path
) -> None:
    shutil.copytree(schnell, tmp_path / "empty")
    for file in (tmp_path / "empty").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="is distilled to sample in few steps"):
        Flux1(str(tmp_path / "empty"))


def test_a_distilled_model_can_be_evaluated(schnell: str) -> None:
    """Evaluation trains nothing."""
    assert not load_model(schnell, schnell, "float32").backbone.takes_guidance


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_step_zero(folder: str, checkpointing: bool, guidance: float) -> None:
    torch.manual_seed(0)  # the LoRA's start
    options = {"gradient_checkpointing": checkpointing, "guidance": guidance}
    backbone = Flux1(folder, lora=LoRA(4), **options)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=2000.0).train()
    pairs = module.form_pairs(image_pairs())
    check_step_zero(module, pairs, torch.full((3,), math.log(2)))


def test_gradients_are_equal_with_checkpointing(folder: str) -> None:
    found = []
    for checkpointing in (False, True):
        backbone = Flux1(folder, lora=LoRA(4), gradient_checkpointing=checkpointing)
        found.append(adapter_gradients(backbone, TEXTS[:2], *noised()))
        assert len(found[-1]) == len(trained(backbone)) > 0
    plain, saved = found
    assert all(gradient.any() for gradient in plain.values())
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_the_adapter_has_attention_and_feed_forward_layers(folder: str) -> None:
    """Those of diffusers' training script; of single blocks the attention alone."""
    layers = {name.split(".lora_")[0] for name in trained(Flux1(folder, lora=LoRA(4)).policy.net)}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    double = {f"transformer_blocks.0.attn.{end}" for end in (*ends, "to_add_out")}
    feed = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    double |= {f"transformer_blocks.0.{end}" for end in feed}
    single = {
        f"single_transformer_blocks.{i}.attn.{end}"
        for i in (0, 1)
        for end in ("to_q", "to_k", "to_v")
    }
    assert layers == double | single


def test_a_lora_is_saved_for_the_stock_pipeline(folder: str, tmp_path: Path) -> None:
    backbone = Flux1(folder, lora=LoRA(4, alpha=8)).eval()
    with torch.no_grad():
        for weight in trained(backbone).values():
            weight.normal_(std=0.1)
    file = backbone.save(tmp_path)
    stock = FluxPipeline.from_pretrained(folder)
    stock.load_lora_weights(str(file))
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    started = Flux1(folder, start_lora=str(file), reference="none").eval()
    with Recorder({"transformer": (backbone.policy.net, "forward")}) as record, torch.no_grad():
        ours = backbone.predict(latents, t, prompt)
        theirs = stock.transformer(**record.calls[0].arguments)[0]
        torch.testing.assert_close(unpack(theirs, 8, 8), ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(started.predict(latents, t, prompt), ours, atol=1e-5, rtol=1e-5)
    with backbone.as_reference():
        assert (ours - backbone.predict(latents, t, prompt)).abs().max() > 1e-3


# Refusals -------------------------------------------------------------------------------------


def test_pipelines_of_other_families_are_refused(
    folder: str, tiny_sd3_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not a FluxPipeline"):
        Flux1(tiny_sd3_folder)
    with pytest.raises(InputError, match="is a FluxPipeline and not a StableDiffusion3Pipeline"):
        StableDiffusion3(folder)
    kontext = changed(folder, tmp_path / "kontext", _class_name="FluxKontextPipeline")
    with pytest.raises(InputError, match="is a FluxKontextPipeline and not"):
        Flux1(kontext)
    with pytest.raises(InputError, match="transformer of .* is a SD3Transformer2DModel and not"):
        Flux1(folder, denoiser=f"{tiny_sd3_folder}/transformer")


@pytest.mark.parametrize(
    ("name", "value"),
    [("pooled_projection_dim", 40), ("joint_attention_dim", 80), ("out_channels", 32)],
)
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, name: str, value: int
) -> None:
    tiny_flux1_transformer(**{name: value}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has {name} {value} where Flux1"):
        Flux1(folder, denoiser=str(tmp_path))


def test_sizes_that_are_no_whole_tokens_are_refused(backbone: Flux1) -> None:
    """Where the stock pipeline rounds them down."""
    with pytest.raises(InputError, match="a multiple of 8"):
        backbone.posterior(torch.zeros(1, 3, 36, 32))
    with pytest.raises(InputError, match="a multiple of 8"):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=36))


@pytest.mark.parametrize(
    ("options", "sentence"), [({"guidance": math.nan}, "guidance"), ({"text_tokens": 0}, "tokens")]
)
def test_numbers_out_of_range_are_refused(
    folder: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        Flux1(folder, **options)


def test_text_encoders_that_every_prompt_needs_cannot_be_left_out(folder: str) -> None:
    with pytest.raises(InputError, match="Flux1 cannot embed prompts without text_encoder_2: "):
        Flux1(folder, without=["text_encoder_2"])

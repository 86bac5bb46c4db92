"""What Stable Diffusion 3 hands to its networks against the stock pipeline, by recording both."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion3
from lit_prefopt.commands.export import export
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.processes.settings import Sampling
from tests.helpers.recorder import Recorder, first_difference, parts_of
from tests.helpers.tiny_sd3 import load_stock_sd3

STEPS = 4
LONG = "a very long prompt that fits into no text encoder, " * 8  # 408 letters
TEXTS = ["a cat", "A red cube, left of a blue ball; 35mm", LONG]


class Models(NamedTuple):
    backbone: StableDiffusion3
    stock: StableDiffusion3Pipeline


class Recorded(NamedTuple):
    ours: Recorder
    theirs: Recorder
    images: Tensor
    expected: Tensor


@pytest.fixture(
    scope="module",
    params=["tiny_sd3_folder", "tiny_sd35_folder", "tiny_sd35_without_t5_folder"],
)
def models(request: pytest.FixtureRequest) -> Models:
    folder = request.getfixturevalue(request.param)
    backbone = StableDiffusion3(folder, t5=(Path(folder) / "text_encoder_3").is_dir())
    return Models(backbone, load_stock_sd3(folder))


def sampled(
    models: Models,
    texts: list[str],
    guidance: float,
    height: int = 32,
    width: int = 32,
    **options: Tensor,
) -> Recorded:
    """Record how both sample the same images, in [0, 1]."""
    backbone, stock = models
    seeds = torch.arange(5, 5 + len(texts))
    how = Sampling(STEPS, guidance, batch_size=len(texts), height=height, width=width)
    parts = {"transformer": (backbone.policy.denoiser, "forward")}
    parts |= {name: (text.network, "forward") for name, text in backbone.texts.items()}
    parts["vae.decode"] = backbone.vae, "decode"
    with Recorder(parts, ends_step="transformer") as ours:
        images = sample(backbone, texts, seeds, how)
    with Recorder(parts_of(stock)) as theirs:
        expected = stock(
            texts,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=draws.normal(seeds, (16, height // 4, width // 4), "start").to(stock.dtype),
            output_type="pt",
            height=height,
            width=width,
            **options,
        ).images
    assert len(ours.of("transformer")) == len(theirs.of("transformer")) == STEPS
    return Recorded(ours, theirs, (images + 1) / 2, expected)


def transformer_difference(record: Recorded, atol: float | None = None) -> str | None:
    """Return the first difference of what the transformer gets and returns."""
    return first_difference(
        record.ours, record.theirs, ["transformer"], tensors_only=True, atol=atol
    )


def empty_embeds(backbone: StableDiffusion3, count: int) -> dict[str, Tensor]:
    """Return the embedded empty prompts as the stock pipeline's arguments."""
    empty = backbone.empty.repeat(count)
    return {
        "negative_prompt_embeds": empty["hidden"],
        "negative_pooled_prompt_embeds": empty["pooled"],
    }


@pytest.mark.parametrize(
    ("texts", "guidance"),
    [(TEXTS[:1], 1.0), (TEXTS[:1], 7.0), (TEXTS, 1.0)],
    ids=["one", "one-guided", "several"],
)
def test_networks_get_bit_for_bit_what_the_stock_pipeline_gives(
    models: Models, texts: list[str], guidance: float
) -> None:
    """Every tensor that the transformer gets and returns at every step, and the VAE's latents."""
    record = sampled(models, texts, guidance)
    assert transformer_difference(record) is None
    difference = first_difference(
        record.ours, record.theirs, ["vae.decode"], results=False, tensors_only=True
    )
    assert difference is None
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)


def test_several_guided_prompts(models: Models) -> None:
    """The empty prompt is embedded once and repeated, where the stock pipeline embeds B of them.

    On a CPU a row of a batch may differ in its last bits from the row alone; with the same
    embedding of the empty prompt all is equal in every bit.
    """
    record = sampled(models, TEXTS, 7.0, **empty_embeds(models.backbone, len(TEXTS)))
    assert transformer_difference(record) is None
    plain = sampled(models, TEXTS, 7.0)
    assert transformer_difference(plain, atol=1e-5) is None
    torch.testing.assert_close(plain.images, plain.expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("swapped", ["t", "order"])
def test_a_wrong_time_or_order_is_noticed(models: Models, swapped: str) -> None:
    """The comparison fails for a time a thousand times too small, and for [positive, negative]."""
    record = sampled(models, TEXTS[:1], 7.0)
    for call in record.ours.calls:
        if call.part == "transformer" and swapped == "t":
            call.arguments["timestep"] /= 1000
        elif call.part == "transformer":
            call.arguments["encoder_hidden_states"] = call.arguments["encoder_hidden_states"].flip(
                0
            )
    name = "timestep" if swapped == "t" else "encoder_hidden_states"
    difference = transformer_difference(record)
    assert difference is not None
    assert difference.startswith(f"transformer of step 0, {name}: float32")


def test_text_encoders_get_the_same_tokens(models: Models) -> None:
    record = sampled(models, TEXTS, guidance=1.0)
    encoders = list(models.backbone.texts)
    assert len(encoders) == 3 - (models.stock.text_encoder_3 is None)
    for name in encoders:
        (ours,), (theirs,) = record.ours.of(name), record.theirs.of(name)
        assert torch.equal(ours.arguments["input_ids"], theirs.arguments["input_ids"])
        assert ours.arguments["attention_mask"] is theirs.arguments["attention_mask"] is None


def test_an_upright_image(models: Models) -> None:
    empty = empty_embeds(models.backbone, 2)
    record = sampled(models, TEXTS[:2], 3.0, height=40, width=24, **empty)
    assert transformer_difference(record) is None
    assert record.images.shape == (2, 3, 40, 24)
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)


def test_prompts_are_embedded_as_the_stock_pipeline_does(models: Models) -> None:
    hidden, empty_hidden, pooled, empty_pooled = models.stock.encode_prompt(
        TEXTS, TEXTS, TEXTS, device="cpu"
    )
    ours, nothing = models.backbone.embed(TEXTS), models.backbone.empty
    assert hidden.shape == (3, 77 + 256, 64)
    torch.testing.assert_close(ours["hidden"], hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["pooled"], pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(nothing.repeat(3)["hidden"], empty_hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(nothing.repeat(3)["pooled"], empty_pooled, atol=1e-5, rtol=0)
    t5 = hidden[:, 77:]
    assert bool(t5.any()) == (models.stock.text_encoder_3 is not None)


def test_latents_are_those_of_the_stock_pipeline(models: Models) -> None:
    """Of its image-to-image pipeline, recorded where it adds noise to them."""
    stock = StableDiffusion3Img2ImgPipeline(**models.stock.components)
    stock.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Recorder({"scale_noise": (stock.scheduler, "scale_noise")}) as theirs:
        stock(
            TEXTS[:2],
            image=images,
            strength=1.0,
            num_inference_steps=1,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        )
    (call,) = theirs.of("scale_noise")
    mean, deviation = models.backbone.encode(2 * images - 1)
    noise = [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    latents = mean + deviation * torch.stack(noise)
    assert (latents - mean).abs().max() > 0.1
    torch.testing.assert_close(latents, call.arguments["sample"], atol=1e-5, rtol=0)


def test_dtypes_in_bfloat16(tiny_sd35_folder: str) -> None:
    """The first step is equal in every bit; the time stays float32.

    Later ones are not, since the stock pipeline keeps its latents in bfloat16 between the steps.
    """
    backbone = StableDiffusion3(tiny_sd35_folder, dtype="bfloat16", lora=LoRA(4))
    stock = load_stock_sd3(tiny_sd35_folder).to(torch.bfloat16)
    record = sampled(Models(backbone, stock), TEXTS[:2], 7.0, **empty_embeds(backbone, 2))
    ours, theirs = record.ours.of("transformer"), record.theirs.of("transformer")
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.arguments.items():
            if isinstance(value, Tensor):
                assert mine.arguments[name].dtype == value.dtype
                assert mine.arguments[name].shape == value.shape
        assert torch.equal(mine.arguments["timestep"], other.arguments["timestep"])
    record.ours.calls, record.theirs.calls = ours[:1], theirs[:1]
    difference = first_difference(
        record.ours, record.theirs, ["transformer"], results=False, tensors_only=True
    )
    assert difference is None


@pytest.mark.parametrize("folder", ["tiny_sd35_folder", "tiny_sd35_without_t5_folder"])
def test_a_single_file_hands_over_what_its_folder_does(
    folder: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Exported by us, loaded by us, and recorded beside the stock pipeline of the folder."""
    pipeline, file = request.getfixturevalue(folder), str(tmp_path / "whole.safetensors")
    export(pipeline, "single-file", file)
    with_t5 = (Path(pipeline) / "text_encoder_3").is_dir()
    backbone = StableDiffusion3(file, config=pipeline, reference="none", t5=with_t5)
    models = Models(backbone, load_stock_sd3(pipeline))
    record = sampled(models, TEXTS, 7.0, **empty_embeds(backbone, len(TEXTS)))
    assert transformer_difference(record) is None
    encoders = list(backbone.texts)
    assert len(encoders) == 2 + with_t5
    for name in encoders:
        (ours,), (theirs,) = record.ours.of(name), record.theirs.of(name)
        assert torch.equal(ours.arguments["input_ids"], theirs.arguments["input_ids"])
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)

"""Stable Diffusion 3 beside its stock pipeline: what is not the same test for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline

from lit_prefopt.backbones import StableDiffusion3
from lit_prefopt.commands.export import export
from tests.families.cases import TEXTS, Models, sampled
from tests.families.sd3 import CASES
from tests.families.test_recorded import transformer_difference
from tests.helpers.recorder import Recorder
from tests.helpers.tiny_sd3 import load_stock_sd3


@pytest.fixture(scope="module", params=[*CASES])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Ours and the stock pipeline, in float32."""
    case = CASES[str(request.param)]
    return case.models(case.write(tmp_path_factory.mktemp("recorded") / "pipeline"))


def test_several_guided_prompts(models: Models) -> None:
    """The empty prompt is embedded once and repeated, where the stock pipeline embeds B of them.

    On a CPU a row of a batch may differ in its last bits from the row alone; with the same
    embedding of the empty prompt all is equal in every bit (`test_recorded.py`).
    """
    plain = replace(models.case, arguments=lambda *_: {"guidance_scale": 7.0})
    record = sampled(models._replace(case=plain), TEXTS, 7.0)
    assert transformer_difference(record, atol=1e-5) is None
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("folder", ["tiny_sd35_folder", "tiny_sd35_without_t5_folder"])
def test_a_single_file_hands_over_what_its_folder_does(
    folder: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Exported by us, loaded by us, and recorded beside the stock pipeline of the folder."""
    pipeline, file = request.getfixturevalue(folder), str(tmp_path / "whole.safetensors")
    export(pipeline, "single-file", file)
    with_t5 = (Path(pipeline) / "text_encoder_3").is_dir()
    backbone = StableDiffusion3(file, config=pipeline, reference="none", t5=with_t5)
    assert len(backbone.empty) == 1  # embedded before the recording
    record = sampled(Models(CASES["sd35"], backbone, load_stock_sd3(pipeline)), TEXTS, 7.0)
    assert transformer_difference(record) is None
    encoders = list(backbone.texts)
    assert len(encoders) == 2 + with_t5
    for name in encoders:
        (ours,), (theirs,) = record.ours.of(name), record.theirs.of(name)
        assert torch.equal(ours.arguments["input_ids"], theirs.arguments["input_ids"])
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)

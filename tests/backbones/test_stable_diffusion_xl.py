"""SDXL against the stock diffusers pipeline: prompts, conditions, predictions, images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusionXL
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.tiny import tiny_xl_pipeline

TEXTS = ["a cat", "a very long prompt that does not fit into the encoders at all"]


@pytest.fixture(scope="module")
def stock(tiny_xl_folder: str) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def backbone(tiny_xl_folder: str) -> StableDiffusionXL:
    return StableDiffusionXL(tiny_xl_folder)


def test_prompts_are_embedded_as_the_stock_pipeline_does(
    backbone: StableDiffusionXL, stock: StableDiffusionXLPipeline
) -> None:
    hidden, empty_hidden, pooled, empty_pooled = stock.encode_prompt(TEXTS, device="cpu")
    ours, nothing = backbone.embed(TEXTS), backbone.embed(["", ""])
    torch.testing.assert_close(ours["hidden"], hidden)
    torch.testing.assert_close(ours["pooled"], pooled)
    assert torch.equal(nothing["hidden"], empty_hidden)
    assert torch.equal(nothing["pooled"], empty_pooled)
    assert (empty_hidden == 0).all()


def test_an_empty_prompt_that_is_not_zero(tmp_path: Path) -> None:
    """Some checkpoints want the encoders' own states of the empty text."""
    folder = tiny_xl_pipeline(tmp_path / "sdxl")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"force_zeros_for_empty_prompt": true,', ""))
    text = index.read_text()
    index.write_text(text.replace("{", '{"force_zeros_for_empty_prompt": false,', 1))
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    _, empty_hidden, _, empty_pooled = stock.encode_prompt("a", device="cpu")
    nothing = StableDiffusionXL(str(folder)).embed([""])
    torch.testing.assert_close(nothing["hidden"], empty_hidden)
    torch.testing.assert_close(nothing["pooled"], empty_pooled)
    assert nothing["hidden"].abs().max() > 0


def test_the_unet_is_told_each_pictures_frame(
    backbone: StableDiffusionXL, stock: StableDiffusionXLPipeline
) -> None:
    latents, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), backbone.embed(TEXTS)
    frames = torch.tensor([[480, 640, 0, 16, 32, 32], [1025, 1023, 7, 0, 32, 32]])
    ids = [
        stock._get_add_time_ids((h, w), (top, left), (a, b), torch.float32, 20)
        for h, w, top, left, a, b in frames.tolist()
    ]
    told = {"text_embeds": prompt["pooled"], "time_ids": torch.cat(ids)}
    theirs = stock.unet(latents, t, prompt["hidden"], added_cond_kwargs=told).sample
    torch.testing.assert_close(backbone.predict(latents, t, prompt.replace(frames=frames)), theirs)
    other = backbone.predict(latents, t, prompt)
    assert not torch.allclose(other, theirs, atol=1e-4)
    whole = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    assert torch.equal(other, backbone.predict(latents, t, prompt.replace(frames=whole)))


def test_images_are_the_stock_pipelines(
    backbone: StableDiffusionXL, stock: StableDiffusionXLPipeline
) -> None:
    seeds, how = torch.tensor([5]), Sampling(steps=4, guidance=5.0)
    ours = sample(backbone, ["a cat"], seeds, how)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    theirs = stock(
        "a cat",
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=draws.normal(seeds, (4, 8, 8), "start"),
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-4, rtol=1e-4)


def test_frames_travel_from_the_data_to_the_unet(backbone: StableDiffusionXL) -> None:
    """Each side has its own, and it changes the error of that side alone."""
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0)
    batch = image_pairs()
    whole = torch.tensor([32, 32, 0, 0, 32, 32]).expand(3, 2, 6).clone()
    cropped = whole.clone()
    cropped[1, 1] = torch.tensor([4000, 3000, 100, 50, 32, 32])

    def errors(frames: Tensor | None) -> Tensor:
        return module.log_ratios(module.form_pairs(batch._replace(frames=frames))).policy_error

    plain, framed = errors(whole), errors(cropped)
    assert torch.equal(errors(None), plain)
    changed = plain != framed
    assert changed.tolist() == [[False, False], [False, True], [False, False]]


def test_the_vae_is_upcast_only_where_it_overflows(tiny_xl_folder: str, tmp_path: Path) -> None:
    lora = LoRA(4)
    half = StableDiffusionXL(tiny_xl_folder, lora=lora, dtype="float16")
    assert half.vae.dtype == torch.float32
    assert half.text_encoder_2.dtype == torch.float16
    coarse = StableDiffusionXL(tiny_xl_folder, lora=lora, dtype="bfloat16")
    assert coarse.vae.dtype == torch.bfloat16
    half.vae.register_to_config(force_upcast=False)
    half.vae.save_pretrained(tmp_path / "fixed")
    fixed = StableDiffusionXL(
        tiny_xl_folder, lora=lora, dtype="float16", vae=str(tmp_path / "fixed")
    )
    assert fixed.vae.dtype == torch.float16


def test_lora_file_loads_in_the_stock_pipeline(tiny_xl_folder: str, tmp_path: Path) -> None:
    backbone = StableDiffusionXL(tiny_xl_folder, lora=LoRA(4, alpha=16))
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    backbone.save(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    latents, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([3]), backbone.embed(["a"])
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    told = {"text_embeds": prompt["pooled"], "time_ids": ids}
    theirs = stock.unet(latents, t, prompt["hidden"], added_cond_kwargs=told).sample
    torch.testing.assert_close(backbone.predict(latents, t, prompt), theirs)
    with backbone.as_reference():
        assert not torch.allclose(backbone.predict(latents, t, prompt), theirs, atol=1e-3)


def test_prompts_without_frames_and_with_them_do_not_mix() -> None:
    framed = Prompt({"hidden": torch.zeros(1, 2, 3)}, frames=torch.zeros(1, 6, dtype=torch.int64))
    assert framed.repeat(2).frames.shape == (2, 6)
    assert "pooled" not in framed.repeat(2)


def test_another_family_is_refused(tiny_folder: str) -> None:
    with pytest.raises(InputError, match="is a StableDiffusionPipeline and not"):
        StableDiffusionXL(tiny_folder)


def test_prompts_of_another_family_are_refused(backbone: StableDiffusionXL) -> None:
    prompt = backbone.embed(["a cat"])
    prompt = prompt.replace(text={"hidden": prompt["hidden"]})
    with pytest.raises(InputError, match="SDXL needs pooled prompts"):
        backbone.predict(torch.zeros(1, 4, 8, 8), torch.tensor([3]), prompt)

"""Chroma against the stock diffusers pipelines, and what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline
from torch import Tensor

from lit_prefopt.backbones import Chroma, Flux1, LoRA, trained
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.processes.settings import Sampling
from tests.helpers.flow_backbones import adapter_gradients, noised
from tests.helpers.recorder import Recorder
from tests.helpers.tiny_chroma import (
    SCHEDULER,
    tiny_chroma_pipeline,
    tiny_chroma_transformer,
)
from tests.helpers.tiny_flux1 import DYNAMIC, tiny_flux1_pipeline

TEXTS = ["a red cat", "", "dog " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_chroma_pipeline(tmp_path_factory.mktemp("chroma")))


@pytest.fixture(scope="module")
def backbone(folder: str) -> Chroma:
    return Chroma(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> ChromaPipeline:
    pipeline = ChromaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_prompts_are_the_stock_pipelines(backbone: Chroma, stock: ChromaPipeline) -> None:
    hidden, _, mask, *_ = stock.encode_prompt(TEXTS)
    ours = backbone.embed(TEXTS)
    torch.testing.assert_close(ours["hidden"], hidden, atol=1e-5, rtol=0)
    assert torch.equal(ours["mask"].float(), mask)
    # a token of padding is left: of nine letters with T5's word mark and end, and of the end alone
    assert ours["mask"].sum(1).tolist() == [9 + 2 + 1, 1 + 1, 512]


@torch.no_grad()
def test_the_number_of_t5s_tokens(folder: str, stock: ChromaPipeline) -> None:
    short = Chroma(folder, reference="none", text_tokens=40)
    hidden, _, mask, *_ = stock.encode_prompt(TEXTS, max_sequence_length=40)
    ours = short.embed(TEXTS)
    torch.testing.assert_close(ours["hidden"], hidden, atol=1e-5, rtol=0)
    assert torch.equal(ours["mask"].float(), mask)
    assert short.latent_settings()["text"] == {"hidden": 64, "mask": 40}
    assert [short.fits_context("a" * n) for n in (38, 39)] == [True, False]
    with pytest.raises(InputError, match="text_tokens"):
        Chroma(folder, text_tokens=0)


@torch.no_grad()
def test_latents_of_images_are_those_of_the_stock_img2img_pipeline(
    backbone: Chroma, stock: ChromaPipeline
) -> None:
    from_images = ChromaImg2ImgPipeline.from_pipe(stock)
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = backbone.encode(images)
    for seed in (0, 1):
        theirs = from_images._encode_vae_image(images, torch.Generator().manual_seed(seed))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mean + deviation * noise, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [SCHEDULER, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(("steps", "size"), [(3, (32, 32)), (7, (64, 40))])
def test_levels_are_those_of_the_stock_pipeline(
    scheduler: dict[str, object], steps: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """Of the published schedule, and of FLUX.1's."""
    folder = str(tiny_chroma_pipeline(tmp_path, scheduler))
    pipeline = ChromaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    height, width = size
    options = {"height": height, "width": width, "guidance_scale": 1.0, "output_type": "latent"}
    pipeline("a", num_inference_steps=steps, **options)
    backbone = Chroma(folder, reference="none", encoders=False)
    shape = (16, height // 4, width // 4)
    ours = backbone.process.sampler(Sampling(steps), shape).levels
    assert torch.equal(ours.float(), pipeline.scheduler.sigmas)


# The mask ---------------------------------------------------------------------------------------


def masks_seen(backbone: Chroma, texts: list[str]) -> list[Tensor]:
    """Return the attention masks of all blocks in a forward with gradients."""
    net = backbone.policy.denoiser
    blocks = [*net.transformer_blocks, *net.single_transformer_blocks]
    (latents, t), prompt = noised(len(texts)), backbone.embed(texts)
    with Recorder({f"{n}": (block, "forward") for n, block in enumerate(blocks)}) as record:
        backbone.train().predict(latents, t, prompt)
    return [call.arguments["attention_mask"] for call in record.calls]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_gets_the_mask(folder: str, checkpointing: bool) -> None:
    """Also the checkpointed single blocks, where diffusers 0.42 leaves it out."""
    backbone = Chroma(folder, lora=LoRA(2), gradient_checkpointing=checkpointing)
    expected = torch.cat([backbone.embed(TEXTS)["mask"].float(), torch.ones(3, 16)], 1)
    masks = masks_seen(backbone, TEXTS)
    assert len(masks) == 3
    assert all(torch.equal(mask, expected) for mask in masks)


def test_two_checkpointed_forwards_have_their_own_masks(folder: str) -> None:
    """The backward pass recomputes each block with the mask of its own forward."""
    found = []
    for checkpointing in (False, True):
        backbone = Chroma(folder, lora=LoRA(2), gradient_checkpointing=checkpointing)
        adapter_gradients(backbone, TEXTS[:1], *noised(1))  # makes it other than the identity
        backbone.zero_grad()
        latents, t = noised(1)
        errors = [backbone.predict(latents, t, backbone.embed([text])) for text in TEXTS]
        sum(error.square().mean() for error in errors).backward()
        found.append({name: p.grad for name, p in trained(backbone).items()})
    plain, saved = found
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert all(gradient.any() for gradient in plain.values())


def test_without_the_fix_single_blocks_lose_the_mask(folder: str) -> None:
    """`masked_checkpoint.py` can go once this fails."""
    backbone = Chroma(folder, reference="none")
    net = backbone.policy.denoiser
    net.enable_gradient_checkpointing()
    assert all(mask is not None for mask in masks_seen(backbone, TEXTS[:1]))
    net._gradient_checkpointing_func = net._gradient_checkpointing_func.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_prefopt.backbones.chroma.mask_checkpointed_blocks", lambda net: None)
        double, *single = masks_seen(backbone, TEXTS[:1])
    assert double is not None
    assert single == [None, None]


@torch.no_grad()
def test_the_mask_changes_the_prediction(backbone: Chroma) -> None:
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    whole = prompt.replace(text=prompt.text | {"mask": torch.ones(2, 512, dtype=torch.bool)})
    difference = backbone.predict(latents, t, prompt) - backbone.predict(latents, t, whole)
    assert difference.abs().max() > 1e-4


# Adapters and refusals --------------------------------------------------------------------------


def test_the_adapter_has_the_layers_of_flux1s(folder: str, tmp_path: Path) -> None:
    """One of FLUX.1 therefore starts a training of Chroma."""
    flux = Flux1(str(tiny_flux1_pipeline(tmp_path / "flux1")), lora=LoRA(2), encoders=False)
    layers = trained(Chroma(folder, lora=LoRA(2), encoders=False)).keys()
    assert layers == trained(flux).keys()
    with torch.no_grad():
        for weight in trained(flux).values():
            weight.normal_(std=0.1)
    file = flux.save(tmp_path)
    with pytest.warns(UserWarning, match=r"is a LoRA of FLUX\.1 by its metadata"):
        started = Chroma(folder, start_lora=str(file), reference="none", encoders=False)
    plain = Chroma(folder, reference="none", encoders=False)
    name = "transformer_blocks.0.attn.to_q.weight"
    ours, before = (x.policy.denoiser.get_parameter(name) for x in (started, plain))
    assert (ours - before).abs().max() > 1e-3


def test_pipelines_of_other_families_are_refused(folder: str, tmp_path: Path) -> None:
    flux = str(tiny_flux1_pipeline(tmp_path / "flux1"))
    with pytest.raises(InputError, match="is a FluxPipeline and not a ChromaPipeline"):
        Chroma(flux)
    with pytest.raises(InputError, match="is a ChromaPipeline and not a FluxPipeline"):
        Flux1(folder)
    with pytest.raises(InputError, match="is a FluxTransformer2DModel and not a ChromaT"):
        Chroma(folder, denoiser=f"{flux}/transformer")
    assert Chroma.FAMILY.vae == FLUX1.vae


@pytest.mark.parametrize(("name", "value"), [("joint_attention_dim", 80), ("out_channels", 32)])
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, name: str, value: int
) -> None:
    tiny_chroma_transformer(**{name: value}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has {name} {value} where Chroma"):
        Chroma(folder, denoiser=str(tmp_path))


def test_guidance_and_sizes_that_it_has_not_are_refused(backbone: Chroma) -> None:
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with pytest.raises(InputError, match="have a guidance scale, which Chroma is not conditioned"):
        backbone.predict(latents, t, prompt.replace(guidance=torch.ones(2)))
    with pytest.raises(InputError, match="a multiple of 8"):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=36))

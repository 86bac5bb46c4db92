"""What a judge sees while pairs are collected, and who else sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import SPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.judges import SMALL_SPO, Brightness
from tests.helpers.tiny import tiny_decoder

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def decoder(tmp_path: Path) -> str:
    return tiny_decoder(tmp_path / "taesd")


def test_it_is_what_the_stock_pipeline_makes_of_it(tiny_folder: str, decoder: str) -> None:
    """There such a decoder is put into the pipeline as its VAE."""
    tiny = AutoencoderTiny.from_pretrained(decoder)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, vae=tiny, safety_checker=None)
    seeds, how = torch.tensor([5]), Sampling(steps=2, guidance=3.0)
    backbone = StableDiffusion(tiny_folder, decoder=decoder)
    theirs = stock.vae.decode(LATENTS / stock.vae.config.scaling_factor).sample
    torch.testing.assert_close(backbone.preview(LATENTS), theirs.clamp(-1, 1))
    # what is shown as evidence stays the VAE's
    plain = StableDiffusion(tiny_folder)
    assert torch.equal(backbone.decode(LATENTS), plain.decode(LATENTS))
    assert torch.equal(plain.preview(LATENTS), plain.decode(LATENTS))
    ours = sample(backbone, ["a cat"], seeds, how)
    assert torch.equal(ours, sample(plain, ["a cat"], seeds, how))


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_the_judge_sees_its_images(
    family: type[StableDiffusion], tiny_folder: str, tiny_xl_folder: str, decoder: str
) -> None:
    folder = tiny_xl_folder if family is StableDiffusionXL else tiny_folder
    backbone = family(folder, lora=LoRA(4), decoder=decoder)
    how = Sampling(steps=4, eta=1.0, batch_size=1)
    module = SPO(backbone, AdamW(1e-3), judge=Brightness(), sampling=how, **SMALL_SPO)
    scores = module.judge_latents(LATENTS, ["a", "b"], torch.zeros(2))
    torch.testing.assert_close(scores, backbone.preview(LATENTS).mean((1, 2, 3)))
    assert (scores - backbone.decode(LATENTS).mean((1, 2, 3))).abs().min() > 1e-3
    small = {name for name, _ in module.named_parameters() if "small_decoder" in name}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert small
    assert not small & trained


def test_its_precision_is_that_of_all_that_is_frozen(tiny_folder: str, decoder: str) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4), decoder=decoder, dtype="bfloat16")
    assert {p.dtype for p in backbone.small_decoder.parameters()} == {torch.bfloat16}
    images = backbone.preview(LATENTS)
    assert images.dtype == torch.float32
    exact = StableDiffusion(tiny_folder, decoder=decoder).preview(LATENTS)
    torch.testing.assert_close(images, exact, atol=0.05, rtol=0.05)


def test_a_pipeline_that_has_one_as_its_vae(tiny_folder: str, decoder: str) -> None:
    pipeline = Path(decoder).parent / "pipeline"
    shutil.copytree(decoder, pipeline / "vae")
    images = StableDiffusion(tiny_folder, decoder=str(pipeline)).preview(LATENTS)
    assert torch.equal(images, StableDiffusion(tiny_folder, decoder=decoder).preview(LATENTS))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_channels": 16}, "of 16 channels where this backbone's VAE makes 4 of 4"),
        (
            {"num_decoder_blocks": (1, 1, 1, 1), "decoder_block_out_channels": (8, 8, 8, 8)},
            "makes 8 pixels of each latent of 4 channels where this backbone's VAE makes 4",
        ),
    ],
)
def test_a_decoder_of_other_latents_is_refused(
    tiny_folder: str, tmp_path: Path, changes: dict, sentence: str
) -> None:
    other = tiny_decoder(tmp_path / "other", **changes)
    with pytest.raises(InputError, match=sentence):
        StableDiffusion(tiny_folder, decoder=other)


def test_what_is_no_small_decoder_is_refused(tiny_folder: str, decoder: str) -> None:
    for other in (tiny_folder, f"{tiny_folder}/vae"):
        with pytest.raises(InputError, match=f"{other} has no AutoencoderTiny: name"):
            StableDiffusion(tiny_folder, decoder=other)
    for other in (f"{decoder}/nowhere", "nobody/nothing"):
        with pytest.raises(InputError, match=f"{other} (does not exist|is no local folder)"):
            StableDiffusion(tiny_folder, decoder=other)
    [weights] = Path(decoder).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(InputError, match="has no vae that can be loaded"):
        StableDiffusion(tiny_folder, decoder=decoder)

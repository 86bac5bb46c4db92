"""Edge control against the stock ControlNet pipeline, and the edges of a known drawing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion, StableDiffusion3, StableDiffusionXL
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.generate.edges import EdgeControl, edges
from lit_prefopt.processes.settings import Sampling
from tests.helpers.generating import controlnet

FAMILIES = {
    "sd": (StableDiffusion, StableDiffusionPipeline, StableDiffusionControlNetPipeline),
    "sdxl": (StableDiffusionXL, StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_controlled_images_are_the_stock_pipelines(
    family: str, tiny_folder: str, tiny_xl_folder: str, tmp_path: Path
) -> None:
    kind, stock_kind, controlled_kind = FAMILIES[family]
    folder = tiny_xl_folder if family == "sdxl" else tiny_folder
    backbone = kind(folder, reference="none").eval()
    control = EdgeControl(controlnet(backbone, tmp_path / "control"), scale=0.7)
    control.check(backbone)
    drawing = Image.new("RGB", (64, 32))
    drawing.paste("white", (10, 5, 12, 30))
    pixels = torch.frombuffer(bytearray(drawing.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, 32, 64, 3).permute(0, 3, 1, 2) / 255

    how = Sampling(steps=3, guidance=3.0, height=32, width=64)
    seeds = torch.tensor([5])
    plain = sample(backbone, ["a cat"], seeds, how)
    with control.condition_on(backbone, pixels):
        ours = sample(backbone, ["a cat"], seeds, how)
    assert not torch.allclose(plain, ours, atol=1e-2)
    assert torch.equal(plain, sample(backbone, ["a cat"], seeds, how))

    whole = stock_kind.from_pretrained(folder)
    scheduler = DDIMScheduler.from_config(whole.scheduler.config, clip_sample=False, steps_offset=1)
    parts = {**whole.components, "scheduler": scheduler, "controlnet": control.net}
    if family == "sd":
        parts["requires_safety_checker"] = False
    parts = {name: p for name, p in parts.items() if p is not None or family == "sd"}
    stock = controlled_kind(**parts)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a cat",
        image=drawing,
        height=32,
        width=64,
        num_inference_steps=3,
        guidance_scale=3.0,
        controlnet_conditioning_scale=0.7,
        latents=draws.normal(seeds, (4, 8, 16), "start"),
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=1e-3)


def test_a_controlnet_of_another_family_is_refused(
    backbone: StableDiffusion, tiny_xl_folder: str, tmp_path: Path
) -> None:
    other = StableDiffusionXL(tiny_xl_folder, reference="none")
    control = EdgeControl(controlnet(other, tmp_path / "control"))
    with pytest.raises(InputError, match=r"--model\.control\.controlnet"):
        control.check(backbone)


def test_edges_are_refused_where_there_is_no_unet(
    backbone: StableDiffusion, tiny_sd35_folder: str, tmp_path: Path
) -> None:
    control = EdgeControl(controlnet(backbone, tmp_path / "control"))
    other = StableDiffusion3(tiny_sd35_folder, reference="none", encoders=False)
    with pytest.raises(InputError, match=r"StableDiffusion3 does not have: remove"):
        control.check(other)
    with (
        pytest.raises(InputError, match=r"StableDiffusion3 does not have"),
        control.condition_on(other, torch.zeros(1, 3, 32, 32)),
    ):
        pass


def test_edges_of_a_square() -> None:
    """A closed line of about one pixel around the square, and nothing else."""
    image = torch.full((1, 3, 48, 48), -1.0)
    image[:, :, 12:36, 12:36] = 1.0
    found = edges(image, 0.25, 0.5)
    assert found.shape == image.shape
    assert set(found.unique().tolist()) == {0.0, 1.0}
    ones = found[0, 0]
    assert ones[14:34, 14:34].sum() == 0
    assert ones[:10].sum() == ones[:, :10].sum() == ones[38:].sum() == 0
    for row in range(14, 34):
        assert 2 <= ones[row].sum() <= 4
        assert ones[row, 10:14].any()
        assert ones[row, 34:38].any()


def test_faint_edges_count_only_beside_strong_ones() -> None:
    ramp = torch.cat([torch.full((24,), 0.1), torch.linspace(0.1, 1.0, 24)])
    image = torch.zeros(1, 3, 48, 48)
    image[..., 24:] = ramp[:, None]  # a step that grows from top to bottom
    alone, along = edges(image, 0.89, 0.9)[0, 0], edges(image, 0.1, 0.9)[0, 0]
    assert alone[:20].sum() == 0
    assert alone[45].sum() == 1
    assert (along[:, 22:26].sum(1) >= 1).all()
    assert edges(image * 0.01, 0.1, 0.9).sum() == 0


def test_edges_do_not_move_with_the_direction() -> None:
    """A quarter turn of the image turns its edges, up to the pixel between two equal ones."""
    grid = torch.arange(48.0)
    disc = ((grid - 23.5).square()[:, None] + (grid - 23.5).square()[None] < 200).float() * 2 - 1
    image: Tensor = disc.expand(1, 3, 48, 48)
    found = edges(image, 0.25, 0.5)[0, 0]
    turned = edges(image.rot90(1, (2, 3)), 0.25, 0.5)[0, 0].rot90(-1, (0, 1))
    near = torch.nn.functional.max_pool2d(turned[None, None], 3, 1, 1)[0, 0]
    assert found.sum() > 60
    assert (found <= near).all()

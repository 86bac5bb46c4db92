"""Export opens weights as a run does, and never writes what is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.exporting import export, refused


@pytest.fixture
def checkpoint(tiny_folder: str, tmp_path: Path) -> Path:
    """A checkpoint of a LoRA, as a run writes it."""
    name = "backbone.policy.denoiser.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {
        f"{name}.lora_A.default.weight": torch.randn(4, 32),
        f"{name}.lora_B.default.weight": torch.randn(32, 4),
    }
    recipe = (
        "backbone:\n  class_path: lit_prefopt.backbones.StableDiffusion\n"
        f"  init_args:\n    pretrained: {tiny_folder}\n    lora: {{rank: 4, alpha: 8}}\n"
    )
    torch.save({"state_dict": state, "recipe": recipe, "global_step": 1}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def to_kohya(source: Path) -> str:
    """Return the message of an export that is refused."""
    out = source.parent / "out.safetensors"
    message = refused("--source", source, "--to", "kohya", "--output", out)
    assert not out.exists()
    return message


@pytest.mark.parametrize("half", ["A", "B"])
def test_nan_in_a_checkpoint(half: str, checkpoint: Path) -> None:
    content = torch.load(checkpoint)
    next(x for k, x in content["state_dict"].items() if f"lora_{half}" in k)[0, 0] = torch.nan
    torch.save(content, checkpoint)
    assert "contains NaN" in to_kohya(checkpoint)


def test_an_alpha_in_the_recipe_that_is_no_number(checkpoint: Path) -> None:
    content = torch.load(checkpoint)
    for alpha in (".nan", "much"):
        recipe = content["recipe"].replace("alpha: 8", f"alpha: {alpha}")
        torch.save(content | {"recipe": recipe}, checkpoint)
        assert "has an alpha that is not a finite number" in to_kohya(checkpoint)


def test_a_lora_that_the_recipe_names_as_a_class_keeps_its_alpha(checkpoint: Path) -> None:
    content = torch.load(checkpoint)
    named = "lora: {class_path: lit_prefopt.backbones.LoRA, init_args: {rank: 4, alpha: 8}}"
    recipe = content["recipe"].replace("lora: {rank: 4, alpha: 8}", named)
    assert named in recipe
    torch.save(content | {"recipe": recipe}, checkpoint)
    out = export(checkpoint, "kohya", checkpoint.with_name("out.safetensors"))
    assert [float(x) for key, x in load_file(out).items() if key.endswith(".alpha")] == [8.0]


def test_one_matrix_alone(checkpoint: Path) -> None:
    content = torch.load(checkpoint)
    content["state_dict"].popitem()
    torch.save(content, checkpoint)
    assert "contains only one matrix of mid_block" in to_kohya(checkpoint)


def test_an_overflow_in_the_precision_of_the_output(tiny_folder: str, tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    for file in Path(tiny_folder, "unet").iterdir():
        (unet / file.name).write_bytes(file.read_bytes())
    weights = unet / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.bias"][0] = 1e5
    save_file(state, weights, {"format": "pt"})
    out = ("--to", "unet", "--output", tmp_path / "out", "--dtype")
    message = refused("--source", unet, *out, "float16")
    assert "The output in float16 contains NaN, infinite" in message
    assert "conv_in.bias" in message
    assert not (tmp_path / "out").exists()

"""Stable Diffusion 3 as a model of an evaluation, and as a start from foreign LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prefopt.backbones import StableDiffusion3
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.models import check_alike, load_model
from lit_prefopt.families import SD3
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora
from tests.helpers.exporting import export
from tests.helpers.tiny_sd3 import load_stock_sd3


def kohya_lora(file: Path) -> Path:
    """Write a LoRA of the transformer and of CLIP-L in the names of sd-scripts."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, outputs in {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": 96,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 64,
    }.items():
        state[f"{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(state, file)
    return file


def states(*networks: nn.Module) -> list[Tensor]:
    return [tensor for net in networks for tensor in net.state_dict().values()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_form_of_a_trained_model_is_loaded(tiny_sd35_folder: str, tmp_path: Path) -> None:
    lora = kohya_lora(tmp_path / "kohya.safetensors")
    merged = load_stock_sd3(tiny_sd35_folder)
    encoders = {part.name: getattr(merged, part.name) for part in SD3.encoders}
    merge_lora(SD3, merged.transformer, encoders, read_lora(lora))
    wanted = states(merged.transformer, merged.text_encoder)
    base = load_model(tiny_sd35_folder)
    before = states(base.backbone.policy.denoiser, base.backbone.text_encoder)
    assert sum(not torch.equal(a, b) for a, b in zip(before, wanted, strict=True)) == 4
    assert base.family == "sd3"
    with_lora = load_model(str(lora), tiny_sd35_folder)
    check_alike(with_lora, base)
    own = with_lora.backbone
    assert_same(states(own.policy.denoiser, own.text_encoder), wanted)
    folder = export(lora, "pipeline", tmp_path / "pipeline", "--base", tiny_sd35_folder)
    own = load_model(str(folder)).backbone
    assert_same(states(own.policy.denoiser, own.text_encoder), wanted)
    alone = export(lora, "single-file", tmp_path / "one.safetensors", "--base", tiny_sd35_folder)
    own = load_model(str(alone), config=tiny_sd35_folder).backbone
    assert_same(states(own.policy.denoiser, own.text_encoder), wanted)
    SD3Transformer2DModel.from_pretrained(folder / "transformer").save_pretrained(tmp_path / "net")
    own = load_model(str(tmp_path / "net"), tiny_sd35_folder).backbone
    assert_same(states(own.policy.denoiser), states(merged.transformer))


def test_training_starts_from_a_foreign_lora(tiny_sd3_folder: str, tmp_path: Path) -> None:
    lora = kohya_lora(tmp_path / "kohya.safetensors")
    merged = load_stock_sd3(tiny_sd3_folder)
    encoders = {part.name: getattr(merged, part.name) for part in SD3.encoders}
    merge_lora(SD3, merged.transformer, encoders, read_lora(lora))
    backbone = StableDiffusion3(tiny_sd3_folder, start_lora=str(lora))
    ours = states(backbone.policy.denoiser, *(backbone.encoders[name] for name in encoders))
    assert_same(ours, states(merged.transformer, *encoders.values()))


def test_models_of_two_families_are_not_compared(tiny_sd3_folder: str, tiny_folder: str) -> None:
    with pytest.raises(InputError, match="of the family sd3 and .* of sd1"):
        check_alike(load_model(tiny_sd3_folder), load_model(tiny_folder))

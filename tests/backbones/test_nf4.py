"""Frozen weights in four bits below an adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from diffusers import StableDiffusionPipeline

from lit_prefopt.backbones import LoRA, StableDiffusion, trained
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from tests.helpers.quantized import NF4, predicted
from tests.helpers.runs import assert_same_end, folder_of


@pytest.fixture
def folded(tiny_folder: str) -> StableDiffusion:
    """An adapter over weights in four bits."""
    return StableDiffusion(tiny_folder, lora=LoRA(4), quantization="nf4")


def test_transformer_blocks_have_four_bits_and_the_adapter_32(folded: StableDiffusion) -> None:
    weights = dict(folded.policy.denoiser.named_parameters())
    kept = {name for name, w in weights.items() if isinstance(w, Params4bit)}
    assert all("transformer_blocks" in name for name in kept)
    # queries, keys, values, outputs and both layers of the feed-forward networks
    assert sum("to_k.base_layer.weight" in name for name in kept) == len(kept) / 5
    assert {weights[name].dtype for name in kept} == {torch.uint8}
    assert {w.dtype for w in trained(folded).values()} == {torch.float32}
    assert not kept & set(trained(folded.policy.denoiser))


def test_the_prediction_stays_near(folded: StableDiffusion, tiny_folder: str) -> None:
    exact, near = predicted(StableDiffusion(tiny_folder, lora=LoRA(4))), predicted(folded)
    assert 0 < (near - exact).square().mean() < 0.01 * exact.square().mean()


def test_a_run_learns_resumes_exactly_and_is_exported(
    recipe: list[str], tiny_folder: str, tmp_path: Path
) -> None:
    halves = [x if x != str(folder_of(recipe)) else str(tmp_path / "halves") for x in recipe]
    main(["fit", *recipe, *NF4])
    main(["fit", *halves, *NF4, "--trainer.max_steps", "2"])
    main(["fit", *halves, *NF4, "--ckpt_path", "last"])
    assert_same_end(folder_of(recipe), tmp_path / "halves")
    state = torch.load(tmp_path / "halves" / "checkpoints" / "last.ckpt", weights_only=True)
    learned = {name: w for name, w in state["state_dict"].items() if "lora_B" in name}
    assert learned
    assert all(weight.abs().max() > 0 for weight in learned.values())
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder)
    stock.load_lora_weights(
        folder_of(recipe) / "weights", weight_name="pytorch_lora_weights.safetensors"
    )


def test_four_bits_want_an_adapter_and_a_library(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--backbone.lora LoRA"):
        StableDiffusion(tiny_folder, quantization="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[bitsandbytes\]"):
        StableDiffusion(tiny_folder, lora=LoRA(4), quantization="nf4")

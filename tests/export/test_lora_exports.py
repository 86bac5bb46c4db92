"""LoRAs on their way out: what other programs load says what the original says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from lit_prefopt.weights.lora_files import read_lora
from tests.helpers.exporting import (
    EVERYWHERE,
    Family,
    export,
    metadata,
    picture,
    prediction,
    refused,
    write_lora,
)


@pytest.mark.parametrize("to", ["kohya", "diffusers-lora"])
def test_exported_lora_makes_the_same_image(family: Family, to: str, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path / "trained", rank=4, alpha=6)
    out = export(lora, to, tmp_path / "out.safetensors", "--base", family.folder)
    ours, theirs = picture(family.pipeline(out)), picture(family.pipeline(lora))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - picture(family.pipeline())).abs().max() > 1e-2
    assert not any("text" in key or "_te" in key for key in load_file(out))


def test_kohya_keys_are_what_its_trainer_writes(family: Family, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path / "trained", rank=4, alpha=6)
    out = export(lora, "kohya", tmp_path / "out.safetensors", "--base", family.folder)
    state, facts = load_file(out), metadata(out)
    large = family.kind is StableDiffusionXLPipeline
    layer = "middle_block_1" if large else "mid_block_attentions_0"
    key = f"lora_unet_{layer}_transformer_blocks_0_attn2_to_out_0"
    assert state[f"{key}.lora_down.weight"].shape == (4, 32)
    assert state[f"{key}.lora_up.weight"].shape == (32, 4)
    assert state[f"{key}.alpha"] == 6
    assert {k.split(".", 1)[1] for k in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert facts["ss_network_dim"] == "4"
    assert facts["ss_network_alpha"] == "6"
    assert facts["ss_base_model_version"] == ("sdxl_base_v1-0" if large else "sd_v1")
    base = "stable-diffusion-xl-v1-base" if large else "stable-diffusion-v1"
    assert facts["modelspec.architecture"] == f"{base}/lora"
    assert facts["modelspec.resolution"] == "32x32"
    assert facts["modelspec.prediction_type"] == "epsilon"


def test_back_from_kohya_to_diffusers_nothing_changes(family: Family, tmp_path: Path) -> None:
    """Text encoders, convolutions, time embeddings and feed-forward layers too."""
    lora = write_lora(family, tmp_path / "a", targets=EVERYWHERE, text=True, convert=dict)
    base = ("--base", family.folder)
    kohya = export(lora, "kohya", tmp_path / "kohya.safetensors", *base)
    back = export(kohya, "diffusers-lora", tmp_path / "back.safetensors", *base)
    before, after = load_file(lora), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {layer.alpha for layer in read_lora(back).layers.values()} == {6}


def test_diffusers_loads_text_encoders_from_kohya(family: Family, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path / "a", text=True)
    kohya = export(lora, "kohya", tmp_path / "k.safetensors", "--base", family.folder)
    ours, theirs = picture(family.pipeline(kohya)), picture(family.pipeline(lora))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_two_loras_become_one(family: Family, tmp_path: Path) -> None:
    start = write_lora(family, tmp_path / "start", rank=3, alpha=2, targets=["to_q", "to_k"])
    trained = write_lora(family, tmp_path / "trained", rank=4, alpha=6, targets=["to_q", "to_v"])
    more = ("--plus", str(start), "--base", family.folder)
    kohya = export(trained, "kohya", tmp_path / "kohya.safetensors", *more)
    diffusers = export(trained, "diffusers-lora", tmp_path / "diffusers.safetensors", *more)
    stock = family.pipeline()
    stock.load_lora_weights(start.parent, weight_name=start.name, adapter_name="start")
    stock.load_lora_weights(trained.parent, weight_name=trained.name, adapter_name="trained")
    stock.set_adapters(["start", "trained"])
    expected = prediction(stock)
    for out in (kohya, diffusers):
        ours = prediction(family.pipeline(out))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    stock.set_adapters(["trained"])
    assert (expected - prediction(stock)).abs().max() > 1e-2


def test_half_precision(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = write_lora(family, tmp_path / "a")
    more = ("--base", family.folder, "--dtype", "float16")
    out = export(lora, "kohya", tmp_path / "k.safetensors", *more)
    kinds = {tensor.dtype for key, tensor in load_file(out).items() if "lora_" in key[10:]}
    assert kinds == {torch.float16}


def test_refusals_name_the_cure(tiny_folder: str, tiny_xl_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionXLPipeline, tiny_xl_folder)
    lora = write_lora(family, tmp_path / "lora")
    out = tmp_path / "out.safetensors"
    common = ("--source", lora, "--to", "kohya", "--output")
    base = ("--base", tiny_xl_folder)
    assert "name it as `--base`" in refused(*common, out)
    assert "another model family" in refused(*common, out, "--base", tiny_folder)
    assert "HF_HUB_OFFLINE forbids downloads" in refused(*common, out, "--base", "no/where")
    assert "use a name that ends in .safetensors" in refused(*common, tmp_path / "out", *base)
    assert "exists; remove it" in refused(*common, lora, *base)
    (tmp_path / "x.pt").write_bytes(b"\x80\x04pickled")
    text = ("--to", "kohya", "--output", out, *base)
    assert "not a safetensors file" in refused("--source", tmp_path / "x.pt", *text)
    assert "does not exist" in refused("--source", tmp_path / "nothing", *text)
    assert "contains neither weights nor" in refused("--source", tmp_path, *text)
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"lora", "x.pt"}  # and nothing half-written

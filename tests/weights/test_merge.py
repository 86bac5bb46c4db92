"""LoRA files of every layout: the merged model says what the stock pipeline says with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lit_prefopt.errors import InputError
from lit_prefopt.families.ldm_names import unet_names
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora
from tests.helpers.exporting import (
    ATTENTION,
    EVERYWHERE,
    Family,
    add_random_adapter,
    picture,
    prediction,
    write_lora,
)


def merged(family: Family, lora: Path):
    """The pipeline with a LoRA merged by us."""
    pipeline = family.pipeline()
    encoders = {part.name: getattr(pipeline, part.name) for part in family.names.encoders}
    merge_lora(family.names, pipeline.unet, encoders, read_lora(lora))
    return pipeline


def test_merged_unet_equals_the_loaded_lora(family: Family, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path)
    assert all(".lora.down." in key or ".lora.up." in key for key in load_file(lora))
    ours = prediction(merged(family, lora))
    torch.testing.assert_close(ours, prediction(family.pipeline(lora)), atol=1e-5, rtol=1e-5)
    assert (ours - prediction(family.pipeline())).abs().max() > 1e-2


def test_layers_of_every_kind(family: Family, tmp_path: Path) -> None:
    """Convolutions, time embeddings and feed-forward layers too, in peft's names and mixed ones."""
    peft = write_lora(family, tmp_path / "peft", targets=EVERYWHERE, convert=dict)
    stock, ours = prediction(family.pipeline(peft)), prediction(merged(family, peft))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    mixed = write_lora(family, tmp_path / "mixed", targets=EVERYWHERE)
    kinds = {key.rsplit(".lora", 1)[1][0] for key in load_file(mixed)}
    assert kinds == {".", "_"}  # diffusers itself drops half of such a file
    assert torch.equal(prediction(merged(family, mixed)), ours)


def test_text_encoders_are_merged_too(family: Family, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path, text=True)
    ours, theirs = merged(family, lora), family.pipeline(lora)
    torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)
    assert (picture(ours) - picture(family.pipeline())).abs().max() > 1e-3


def kohya_file(family: Family, folder: Path, alpha: float, original: bool) -> Path:
    """A kohya file by diffusers' own hand, in one of the two spellings of its layers."""
    unet = family.pipeline().unet
    names = unet_names(name for name, _ in unet.named_modules())
    add_random_adapter(unet, 4, 4, ATTENTION)
    state = get_peft_model_state_dict(unet)
    if original:
        state = {
            f"{names[k.split('.lora_')[0]]}.lora_{k.split('.lora_')[1]}": state[k] for k in state
        }
    kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    kohya = {k: torch.tensor(alpha) if k.endswith(".alpha") else v for k, v in kohya.items()}
    save_file(
        {key: value.contiguous() for key, value in kohya.items()}, folder / "kohya.safetensors"
    )
    return folder / "kohya.safetensors"


def test_kohya_file_equals_the_stock_pipeline(family: Family, tmp_path: Path) -> None:
    lora = kohya_file(family, tmp_path, alpha=2.5, original=False)
    ours, stock = prediction(merged(family, lora)), prediction(family.pipeline(lora))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert (ours - prediction(family.pipeline())).abs().max() > 1e-2


def test_kohya_file_in_the_original_spelling(tiny_xl_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionXLPipeline, tiny_xl_folder)
    lora = kohya_file(family, tmp_path, alpha=2.5, original=True)
    assert any("lora_unet_input_blocks_" in key for key in load_file(lora))
    ours, stock = prediction(merged(family, lora)), prediction(family.pipeline(lora))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_alphas_by_layer(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = write_lora(family, tmp_path)
    plain = read_lora(lora)
    assert {layer.alpha for layer in plain.layers.values()} == {6}
    facts = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 8}}
    metadata = {"lora_adapter_metadata": json.dumps(facts)}
    save_file(load_file(lora), lora, metadata)
    alphas = {name: layer.alpha for (_, name), layer in read_lora(lora).layers.items()}
    assert {name.endswith("attn1_to_q") for name, alpha in alphas.items() if alpha == 8} == {True}
    assert {name.endswith("attn1_to_q") for name, alpha in alphas.items() if alpha == 4} == {False}


def test_alphas_by_layer_in_kohya_files(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = kohya_file(family, tmp_path, alpha=2.5, original=False)
    state = load_file(lora)
    one = next(key for key in state if key.endswith("attn1_to_q.alpha"))
    del state[one.replace("to_q", "to_v")]  # the rank, by kohya's convention
    save_file(state | {one: torch.tensor(8.0)}, lora)
    alphas = {name: layer.alpha for (_, name), layer in read_lora(lora).layers.items()}
    name = one.removeprefix("lora_unet_").removesuffix(".alpha")
    assert alphas.pop(name) == 8
    assert alphas.pop(name.replace("to_q", "to_v")) == 4
    assert set(alphas.values()) == {2.5}


def test_merging_into_half_precision_rounds_once(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = write_lora(family, tmp_path)
    half = family.pipeline().unet.to(torch.bfloat16)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = half.get_submodule(name).weight.detach().float()
    merge_lora(family.names, half, {}, read_lora(lora))
    delta = read_lora(lora).layers["denoiser", name.replace(".", "_")].delta
    after = half.get_submodule(name).weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before + delta).to(torch.bfloat16))


def test_a_lora_of_another_family_is_refused(
    tiny_folder: str, tiny_xl_folder: str, tmp_path: Path
) -> None:
    small = Family(StableDiffusionPipeline, tiny_folder)
    large = Family(StableDiffusionXLPipeline, tiny_xl_folder)
    with pytest.raises(InputError, match="another model family: it maps 32 values to 32"):
        merged(large, write_lora(small, tmp_path / "small"))
    with pytest.raises(InputError, match="32 of its 64 layers are not in this model"):
        merged(small, write_lora(large, tmp_path / "large"))


def broken(lora: Path, **changes: torch.Tensor | None) -> Path:
    """The file with keys added, or replaced, or (None) left out."""
    state = {**load_file(lora), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, lora)
    return lora


def test_what_is_no_plain_lora_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    with pytest.raises(InputError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not at all")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_lora(tmp_path / "text.safetensors")
    save_file({"conv_in.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match="contains no LoRA"):
        read_lora(tmp_path / "unet.safetensors")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one = torch.ones(4)
    for number, (message, changes) in enumerate(
        {
            "a plain LoRA": {f"{key}.lora_magnitude_vector": one},
            "contains only down of its layer": {f"{key}.lora.up.weight": None},
            "do not fit": {f"{key}.lora.up.weight": torch.ones(32, 3)},
            "is a peft adapter": {"base_model.model.x.lora_A.weight": one},
        }.items()
    ):
        lora = broken(write_lora(family, tmp_path / str(number)), **changes)
        with pytest.raises(InputError, match=message):
            read_lora(lora)


def test_text_encoder_layers_are_not_dropped_in_silence(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = read_lora(write_lora(family, tmp_path, text=True))
    with pytest.raises(InputError, match="also changes the text_encoder"):
        merge_lora(family.names, family.pipeline().unet, {}, lora)

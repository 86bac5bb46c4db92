"""What an export of a LoRA reports about layers that diffusers leaves out, by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.layouts import Layout
from lit_prefopt.export.unread import describe_unread, lora_parts, unread_layers
from lit_prefopt.export.write_lora import (
    Layers,
    write_comfyui_lora,
    write_diffusers_lora,
    write_kohya_lora,
)
from lit_prefopt.weights.lora_files import LoRALayer
from lit_prefopt.weights.lora_layers import adaptable
from tests.helpers.exporting import export
from tests.helpers.flow_families import FLOW_FAMILIES
from tests.helpers.tiny import tiny_pipeline, tiny_xl_pipeline
from tests.helpers.tiny_sd3 import tiny_sd35_pipeline

WRITERS = {
    "diffusers-lora": write_diffusers_lora,
    "kohya": write_kohya_lora,
    "comfyui": write_comfyui_lora,
}
PUBLISHED_WIDTH = ("flux1", "chroma", "lumina2")

PIPELINES = {
    "sd1": tiny_pipeline,
    "sdxl": tiny_xl_pipeline,
    "sd3": tiny_sd35_pipeline,
    **{name: case.write for name, case in FLOW_FAMILIES.items() if name not in PUBLISHED_WIDTH},
}
"""All but those whose fused layers diffusers 0.42 reads in the published width alone."""


def layers_of(base: BasePipeline, *parts: str) -> Layers:
    """Return a LoRA of all layers of some networks of a pipeline."""
    nets = base.skeleton()
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for part in parts:
        for name in adaptable(nets[part]):
            weight = nets[part].get_submodule(name).weight
            down = torch.randn(2, *weight.shape[1:], generator=generator)
            ones = [1] * (weight.ndim - 2)
            up = torch.randn(len(weight), 2, *ones, generator=generator)
            layers[part, name] = LoRALayer(down, up, 4.0)
    return layers


def read_by_diffusers(folder: Path, file: Path, parts: list[str]) -> set[tuple[str, str]]:
    """Return the layers that the stock pipeline gives an adapter; none if it refuses the file."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except ValueError:
        return set()
    return {
        (part, name)
        for part in parts
        for name, module in getattr(pipeline, part).named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_tables_of_families_are_what_diffusers_does(
    name: str, to: Layout, tmp_path: Path
) -> None:
    folder = PIPELINES[name](tmp_path / "base")
    base = BasePipeline(str(folder))
    parts = [
        base.family.denoiser.name,
        *(part for part in base.encoders if part in lora_parts(base)),
    ]
    layers = layers_of(base, *parts)
    file = tmp_path / "lora.safetensors"
    WRITERS[to](layers, file, base, torch.float32)
    read = read_by_diffusers(folder, file, parts)
    assert {*unread_layers(layers, to, base)} == layers.keys() - read


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", PIPELINES)
def test_text_encoders_that_diffusers_does_not_load(name: str, to: Layout, tmp_path: Path) -> None:
    """With some of them it leaves out their layers, with others it refuses the whole file."""
    folder = PIPELINES[name](tmp_path / "base")
    base = BasePipeline(str(folder))
    others = [part for part in base.encoders if part not in lora_parts(base)]
    if not others:
        assert name in ("sd1", "sdxl")
        return
    layers = layers_of(base, base.family.denoiser.name, *others)
    file = tmp_path / "lora.safetensors"
    WRITERS[to](layers, file, base, torch.float32)
    lost = {key for key in layers if key[0] in others}
    assert lost <= {*unread_layers(layers, to, base)}
    assert not lost & read_by_diffusers(folder, file, others)


def wide_base(name: str, folder: Path) -> BasePipeline:
    """Return a small pipeline whose transformer has the published width by its configuration."""
    case = FLOW_FAMILIES[name]
    case.write(folder)
    config = case.empty().config
    stated = {key: config[key] for key in config if key != "_use_default_values"}
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(stated | {"_class_name": case.kind.__name__}))
    return BasePipeline(str(folder))


def converted(layers: Layers, to: Layout, base: BasePipeline, file: Path) -> set[tuple[str, str]]:
    """Return the layers that diffusers finds in a written file; none if it refuses the file."""
    WRITERS[to](layers, file, base, torch.float32)
    try:
        read = base.kind.lora_state_dict(load_file(file))
    except ValueError:
        return set()
    return {key for key in layers if f"{'.'.join(key)}.lora_A.weight" in read}


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", PUBLISHED_WIDTH)
def test_the_published_width(name: str, to: Layout, tmp_path: Path) -> None:
    base = wide_base(name, tmp_path / "base")
    layers = layers_of(base, "transformer")
    few = {key: layer for key, layer in layers.items() if "distilled" not in key[1]}
    for some in (layers, few):
        lost = some.keys() - converted(some, to, base, tmp_path / "lora.safetensors")
        assert {*unread_layers(some, to, base)} == lost
    assert len(lost) == {"flux1": 10, "chroma": 3, "lumina2": len(layers)}[name]
    assert not unread_layers(layers, "diffusers-lora", base)


def test_t5_of_chroma(tmp_path: Path) -> None:
    """Its pipeline has it as `text_encoder`, the name of FLUX.1's CLIP, which diffusers loads."""
    base = wide_base("chroma", tmp_path / "base")
    layers = layers_of(base, "transformer", "text_encoder")
    layers = {key: layer for key, layer in layers.items() if "distilled" not in key[1]}
    for to in ("kohya", "comfyui"):
        lost = layers.keys() - converted(layers, to, base, tmp_path / f"{to}.safetensors")
        assert {*unread_layers(layers, to, base)} == lost
        assert len({part for part, _ in lost}) == 2
    file = tmp_path / "t5.safetensors"
    only = {key: layer for key, layer in layers.items() if key[0] == "text_encoder"}
    with pytest.raises(InputError, match="diffusers loads no LoRA of the text_encoder of a Chroma"):
        write_diffusers_lora(only, file, base, torch.float32)
    weights = {
        f"{name}.lora_{half}.weight": tensor
        for (_, name), layer in only.items()
        for half, tensor in (("A", layer.down), ("B", layer.up))
    }
    base.kind.save_lora_weights(tmp_path, weight_name=file.name, text_encoder_lora_layers=weights)
    tiny = FLOW_FAMILIES["chroma"].write(tmp_path / "tiny")
    assert not read_by_diffusers(tiny, file, ["text_encoder"])


def test_the_sentence(tmp_path: Path) -> None:
    base = wide_base("flux1", tmp_path / "base")
    both = [
        ("transformer", "proj_out"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"),
    ]
    assert describe_unread(
        [*both, ("transformer", "transformer_blocks.0.attn.to_q")], "kohya", base
    ) == (
        "diffusers 0.42 leaves out 2 of the 3 layers of this file (transformer.proj_out, "
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q) when it loads it: export to "
        "pipeline for it."
    )


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = FLOW_FAMILIES["z-image"].write(tmp_path / "base")
    names = {"layers.0.attention.to_q": 32, "all_x_embedder.2-1": 64}
    state = {}
    for name, inputs in names.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.ones(2, inputs)
        state[f"transformer.{name}.lora_B.weight"] = torch.ones(32, 2)
    lora = tmp_path / "lora.safetensors"
    save_file(state, lora)
    base = ("--base", str(folder))
    out = export(lora, "kohya", tmp_path / "kohya.safetensors", *base)
    assert capsys.readouterr().out.splitlines() == [
        f"Written: {out}",
        "diffusers 0.42 leaves out 1 of the 2 layers of this file (transformer.all_x_embedder.2-1) "
        "when it loads it: export to diffusers-lora for it.",
    ]
    out = export(lora, "comfyui", tmp_path / "comfyui.safetensors", *base)
    assert capsys.readouterr().out == f"Written: {out}\n"


def test_a_file_of_which_nothing_is_read(
    tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    state = {f"{key}A.weight": torch.ones(2, 32), f"{key}B.weight": torch.ones(32, 2)}
    lora = tmp_path / "lora.safetensors"
    save_file(state, lora)
    export(lora, "comfyui", tmp_path / "out.safetensors", "--base", tiny_folder)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "diffusers 0.42 reads none of the 1 layers of this file: export to diffusers-lora for it."
    ]

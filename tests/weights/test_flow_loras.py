"""LoRAs of flow families in all namings, there, back and by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.write_lora import (
    write_comfyui_lora,
    write_diffusers_lora,
    write_kohya_lora,
)
from lit_prefopt.weights.lora_files import LoRALayer, read_lora
from lit_prefopt.weights.lora_layers import adaptable
from lit_prefopt.weights.merge import match_lora
from tests.helpers.flow_families import FLOW_FAMILIES, FlowFamily

WRITERS = {
    "diffusers-lora": write_diffusers_lora,
    "kohya": write_kohya_lora,
    "comfyui": write_comfyui_lora,
}
Layers = dict[tuple[str, str], LoRALayer]


@pytest.fixture(params=FLOW_FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BasePipeline]:
    """Pipelines whose transformer is configured as wide as the published one, by family."""
    found = {}
    for name, case in FLOW_FAMILIES.items():
        folder = case.write(tmp_path_factory.mktemp(name) / "base")
        config = case.empty().config
        kept = {key: config[key] for key in config if key != "_use_default_values"}
        stated = kept | {"_class_name": case.kind.__name__}
        (folder / "transformer" / "config.json").write_text(json.dumps(stated))
        found[name] = BasePipeline(str(folder))
    return found


def random_layers(net: nn.Module, alphas: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Layers:
    """Return a LoRA of all layers of a transformer, of several ranks and alphas."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for number, name in enumerate(adaptable(net)):
        rank = 2 + number % 2
        outputs, inputs = net.get_submodule(name).weight.shape
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        alpha = alphas[number % len(alphas)]
        layers["transformer", name] = LoRALayer(down, up, alpha)
    return layers


def effect(layer: LoRALayer) -> Tensor:
    """Return what a layer's update makes of one input, which stands for the update."""
    generator = torch.Generator().manual_seed(layer.down.shape[1])
    given = torch.randn(layer.down.shape[1], generator=generator)
    return layer.alpha / layer.rank * (layer.up @ (layer.down @ given))


def assert_same_updates(ours: Layers, theirs: Layers) -> None:
    assert ours.keys() == theirs.keys()
    for key, layer in theirs.items():
        torch.testing.assert_close(effect(ours[key]), effect(layer), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("to", WRITERS)
def test_every_layer_comes_back(
    name: str, to: str, bases: dict[str, BasePipeline], tmp_path: Path
) -> None:
    base, file = bases[name], tmp_path / "lora.safetensors"
    layers = random_layers(base.skeleton()["transformer"])
    WRITERS[to](layers, file, base, torch.float32)
    back = match_lora(base.family, base.skeleton(), read_lora(file))
    assert_same_updates(back, layers)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_one_strength_comes_back_bit_for_bit(
    name: str, to: str, bases: dict[str, BasePipeline], tmp_path: Path
) -> None:
    """Pieces of a fused layer with ranks of their own become one layer, and are found in it."""
    base, file = bases[name], tmp_path / "lora.safetensors"
    layers = {
        key: layer._replace(alpha=float(layer.rank))
        for key, layer in random_layers(base.skeleton()["transformer"]).items()
    }
    WRITERS[to](layers, file, base, torch.float32)
    state = load_file(file)
    back = match_lora(base.family, base.skeleton(), read_lora(file))
    assert back.keys() == layers.keys()
    for key, layer in layers.items():
        assert torch.equal(back[key].down, layer.down)
        assert torch.equal(back[key].up, layer.up)
        assert back[key].alpha == layer.alpha
    again = tmp_path / "again.safetensors"
    WRITERS[to](back, again, base, torch.float32)
    written = load_file(again)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


OUTSIDE = {
    "flux1": {"context_embedder", "norm_out.linear", "proj_out", "x_embedder"}
    | {
        f"time_text_embed.{part}_embedder.linear_{n}"
        for part in ("timestep", "guidance", "text")
        for n in (1, 2)
    },
    "chroma": {"context_embedder", "proj_out", "x_embedder"},
    "flux2": {"norm_out.linear", "single_stream_modulation.linear"}
    | {f"double_stream_modulation_{part}.linear" for part in ("img", "txt")},
    "z-image": {"all_x_embedder.2-1", "all_final_layer.2-1.linear"}
    | {"all_final_layer.2-1.adaLN_modulation.1"},
}
"""Layers outside of the blocks that diffusers 0.42 leaves out of files in original names."""


@pytest.mark.parametrize("to", WRITERS)
def test_the_stock_pipeline_reads_the_same_updates(
    name: str, to: str, bases: dict[str, BasePipeline], tmp_path: Path
) -> None:
    base, file = bases[name], tmp_path / "lora.safetensors"
    layers = random_layers(base.skeleton()["transformer"])
    WRITERS[to](layers, file, base, torch.float32)
    pipeline = FLOW_FAMILIES[name].pipeline
    if name == "chroma" and to != "diffusers-lora":
        with pytest.raises(ValueError, match=r"(?s)Incompatible keys .*distilled_guidance_layer"):
            pipeline.lora_state_dict(load_file(file))
        layers = {key: x for key, x in layers.items() if "distilled_guidance" not in key[1]}
        WRITERS[to](layers, file, base, torch.float32)
    if to == "comfyui" and name in ("flux2", "lumina2"):
        with pytest.raises(ValueError, match=r"should be empty at this point .*alpha"):
            pipeline.lora_state_dict(load_file(file))
        return
    read = pipeline.lora_state_dict(load_file(file))
    found = {}
    for key, layer in layers.items():
        start = ".".join(key)
        if f"{start}.lora_A.weight" in read:
            down, up = (read[f"{start}.lora_{half}.weight"] for half in "AB")
            # alphas are folded into what is not diffusers' own
            alpha = layer.alpha if to == "diffusers-lora" else float(len(down))
            found[key] = LoRALayer(down, up, alpha)
    own = to == "diffusers-lora" or (name, to) == ("z-image", "comfyui")
    lost = set() if own else OUTSIDE.get(name, set())
    if (name, to) == ("lumina2", "kohya"):  # its reader knows no kohya names
        lost = {layer for _, layer in layers}
    assert {layer for _, layer in layers.keys() - found.keys()} == lost
    assert_same_updates(found, {key: layers[key] for key in found})


def matrices(outputs: int, inputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return down, torch.randn(outputs, rank, generator=generator)


FOREIGN = {
    # kohya's sd-scripts: fused layers, modulation and layers outside of the blocks
    "flux1": (
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight lora_unet_{}.alpha",
        {
            "single_blocks_1_linear1": (
                (3 * 32 + 128, 32),
                {
                    f"single_transformer_blocks.1.{layer}": rows
                    for layer, rows in {
                        "attn.to_q": slice(0, 32),
                        "attn.to_k": slice(32, 64),
                        "attn.to_v": slice(64, 96),
                        "proj_mlp": slice(96, None),
                    }.items()
                },
            ),
            "double_blocks_0_txt_attn_qkv": (
                (96, 32),
                {
                    f"transformer_blocks.0.attn.add_{letter}_proj": slice(32 * n, 32 * n + 32)
                    for n, letter in enumerate("qkv")
                },
            ),
            "double_blocks_0_img_mod_lin": ((192, 32), {"transformer_blocks.0.norm1.linear": ...}),
            "img_in": ((32, 64), {"x_embedder": ...}),
        },
    ),
    # ai-toolkit: no alpha, so that the strength is 1
    "flux2": (
        "diffusion_model.{}.lora_A.weight diffusion_model.{}.lora_B.weight",
        {
            "single_blocks.0.linear1": (
                (3 * 32 + 2 * 96, 32),
                {"single_transformer_blocks.0.attn.to_qkv_mlp_proj": ...},
            ),
            "double_blocks.0.img_attn.qkv": (
                (96, 32),
                {
                    f"transformer_blocks.0.attn.to_{letter}": slice(32 * n, 32 * n + 32)
                    for n, letter in enumerate("qkv")
                },
            ),
            "double_stream_modulation_txt.lin": (
                (192, 32),
                {"double_stream_modulation_txt.linear": ...},
            ),
        },
    ),
    # musubi-tuner
    "qwen-image": (
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight lora_unet_{}.alpha",
        {
            "transformer_blocks_1_attn_add_k_proj": (
                (32, 32),
                {"transformer_blocks.1.attn.add_k_proj": ...},
            ),
            "transformer_blocks_0_img_mlp_net_0_proj": (
                (128, 32),
                {"transformer_blocks.0.img_mlp.net.0.proj": ...},
            ),
        },
    ),
    # kohya's sd-scripts: fewer heads of key and value than of query
    "lumina2": (
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight lora_unet_{}.alpha",
        {
            "layers_1_attention_qkv": (
                (24 + 2 * 8, 24),
                {
                    "layers.1.attn.to_q": slice(0, 24),
                    "layers.1.attn.to_k": slice(24, 32),
                    "layers.1.attn.to_v": slice(32, 40),
                },
            ),
            "context_refiner_0_attention_out": ((24, 24), {"context_refiner.0.attn.to_out.0": ...}),
            "noise_refiner_0_adaLN_modulation_1": ((96, 24), {"noise_refiner.0.norm1.linear": ...}),
            "layers_0_feed_forward_w2": ((24, 96), {"layers.0.feed_forward.linear_2": ...}),
            "final_layer_linear": ((64, 24), {"norm_out.linear_2": ...}),
            "cap_embedder_1": ((24, 16), {"time_caption_embed.caption_embedder.1": ...}),
        },
    ),
    # trainers that wrap the modules of ComfyUI's files
    "z-image": (
        "diffusion_model.{}.lora_down.weight diffusion_model.{}.lora_up.weight "
        "diffusion_model.{}.alpha",
        {
            "layers.1.attention.qkv": (
                (96, 32),
                {
                    f"layers.1.attention.to_{letter}": slice(32 * n, 32 * n + 32)
                    for n, letter in enumerate("qkv")
                },
            ),
            "noise_refiner.0.attention.out": (
                (32, 32),
                {"noise_refiner.0.attention.to_out.0": ...},
            ),
            "layers.0.feed_forward.w2": ((32, 85), {"layers.0.feed_forward.w2": ...}),
            "x_embedder": ((32, 64), {"all_x_embedder.2-1": ...}),
        },
    ),
    # kohya's sd-scripts with --model_type chroma, and trainers that adapt the approximator too
    "chroma": (
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight lora_unet_{}.alpha",
        {
            "single_blocks_1_linear1": (
                (3 * 32 + 128, 32),
                {
                    f"single_transformer_blocks.1.{layer}": rows
                    for layer, rows in {
                        "attn.to_q": slice(0, 32),
                        "attn.to_k": slice(32, 64),
                        "attn.to_v": slice(64, 96),
                        "proj_mlp": slice(96, None),
                    }.items()
                },
            ),
            "double_blocks_0_img_mlp_2": ((32, 128), {"transformer_blocks.0.ff.net.2": ...}),
            "distilled_guidance_layer_layers_1_in_layer": (
                (24, 24),
                {"distilled_guidance_layer.layers.1.linear_1": ...},
            ),
        },
    ),
}
"""Keys of trainers' files by family, the sizes of their layers, and the rows of diffusers'."""


def foreign_lora(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a LoRA as its trainer writes it, and the updates of diffusers' layers."""
    keys, layers = FOREIGN[name]
    state, updates = {}, {}
    for seed, (layer, ((outputs, inputs), targets)) in enumerate(layers.items()):
        down, up = matrices(outputs, inputs, 3, seed)
        alpha = torch.tensor(1.5 + seed) if "alpha" in keys else torch.tensor(3.0)
        written = [key.format(layer) for key in keys.split()]
        state |= dict(zip(written, (down, up, alpha), strict=False))
        for target, rows in targets.items():
            updates[target] = (alpha / 3 * (up @ down))[rows]
    return state, updates


def matched(case: FlowFamily, file: Path) -> dict[tuple[str, str], LoRALayer]:
    return match_lora(case.names, {"transformer": case.build()}, read_lora(file))


def test_a_foreign_lora_is_read_whole(name: str, tmp_path: Path) -> None:
    state, updates = foreign_lora(name)
    save_file(state, tmp_path / "foreign.safetensors")
    found = matched(FLOW_FAMILIES[name], tmp_path / "foreign.safetensors")
    assert {layer for _, layer in found} == updates.keys()
    for (_, layer), own in found.items():
        torch.testing.assert_close(own.delta, updates[layer], atol=1e-5, rtol=1e-5)


ATTENTION = {
    "flux1": ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_add_out"),
    "flux2": ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_add_out"),
    "chroma": ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_add_out"),
    "z-image": ("layers.1.attention.out", "layers.0.attention.to_out.0"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_original_and_diffusers_names_in_one_file(name: str, tmp_path: Path) -> None:
    down, up = matrices(32, 32, 2, 0)
    original, own = ATTENTION[name]
    state = {}
    for layer in (original, own):
        state[f"diffusion_model.{layer}.lora_A.weight"] = down.clone()
        state[f"diffusion_model.{layer}.lora_B.weight"] = up.clone()
    save_file(state, tmp_path / "mixed.safetensors")
    with pytest.raises(InputError, match="mixes the names of two layouts, such as ") as stop:
        matched(FLOW_FAMILIES[name], tmp_path / "mixed.safetensors")
    assert original.replace(".", "_") in str(stop.value)
    assert own.replace(".", "_") in str(stop.value)


@pytest.mark.parametrize("second", ["transformer.transformer_blocks.1.attn.to_k", "img_in"])
def test_two_beginnings_in_one_file(second: str, tmp_path: Path) -> None:
    down, up = matrices(32, 32, 2, 0)
    state = {}
    for layer in ("lora_unet_transformer_blocks_0_attn_to_q", second):
        state[f"{layer}.lora_down.weight"] = down.clone()
        state[f"{layer}.lora_up.weight"] = up.clone()
    save_file(state, tmp_path / "mixed.safetensors")
    with pytest.raises(InputError, match="mixes the names of two layouts, such as .*lora_unet_"):
        read_lora(tmp_path / "mixed.safetensors")


def test_a_lora_of_another_family(name: str, tmp_path: Path) -> None:
    save_file(foreign_lora(name)[0], tmp_path / "foreign.safetensors")
    for other, case in FLOW_FAMILIES.items():
        if other != name:
            with pytest.raises(InputError, match="is a LoRA of another model family"):
                matched(case, tmp_path / "foreign.safetensors")

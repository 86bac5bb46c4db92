"""LoRAs of many trainers: every weight is changed by its alpha / rank times up @ down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.families.ldm_names import unet_names
from lit_prefopt.weights.lora_files import flat_name, read_lora
from lit_prefopt.weights.merge import merge_lora
from tests.helpers.exporting import Family, export, refused

LAYERS = {
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (4, 1.0),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (8, 8.0),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (2, 16.0),
    "mid_block.resnets.0.conv1": (3, 0.5),
    "down_blocks.0.downsamplers.0.conv": (5, 2.0),
    "mid_block.attentions.0.proj_in": (6, 3.0),
}
"""Layers with ranks and alphas of their own: linear ones and convolutions."""

TEXT_LAYERS = {
    "encoder.layers.0.self_attn.q_proj": (4, 2.0),
    # without it diffusers' own loader drops the other layers of attention from a kohya file
    "encoder.layers.0.self_attn.out_proj": (3, 5.0),
    "encoder.layers.1.mlp.fc1": (2, 7.0),
}


def matrices(net: nn.Module, layers: dict[str, tuple[int, float]]) -> dict[str, tuple[Tensor, ...]]:
    """Return random matrices and the alpha of each layer, of the shapes that trainers write."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, (rank, alpha) in layers.items():
        weight = net.get_submodule(name).weight
        down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        made[name] = down, up, torch.tensor(alpha)
    return made


def delta(down: Tensor, up: Tensor, alpha: Tensor) -> Tensor:
    """Return the change of a weight, element by element as in the paper."""
    rank = len(down)
    summed = torch.zeros(len(up), *down.shape[1:], dtype=torch.float64)
    for r in range(rank):
        column = up[:, r].reshape(-1, *[1] * (down.ndim - 1)).double()
        summed += column * down[r].double()
    return (float(alpha) / rank * summed).float()


def assert_changed_by(
    net: nn.Module, before: nn.Module, made: dict[str, tuple[Tensor, ...]]
) -> None:
    """Check every weight of a network: changed by its delta, or not at all."""
    old = before.state_dict()
    for key, weight in net.state_dict().items():
        name = key.removesuffix(".weight")
        change = delta(*made[name]) if name in made and key.endswith(".weight") else 0.0
        torch.testing.assert_close(weight, old[key] + change, atol=1e-6, rtol=1e-5)


def text_name(encoder: nn.Module, name: str) -> str:
    """Return a layer's name in this version of transformers."""
    return name if hasattr(encoder, "encoder") else f"text_model.{name}"


def merged(family: Family, lora: Path) -> StableDiffusionPipeline:
    pipeline = family.pipeline()
    encoders = {part.name: getattr(pipeline, part.name) for part in family.names.encoders}
    merge_lora(family.names, pipeline.unet, encoders, read_lora(lora))
    return pipeline


def kohya(family: Family, path: Path) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Write a kohya file whose modules all have ranks and alphas of their own."""
    pipeline = family.pipeline()
    unet = matrices(pipeline.unet, LAYERS)
    encoder = pipeline.text_encoder
    text = matrices(encoder, {text_name(encoder, n): x for n, x in TEXT_LAYERS.items()})
    first = "lora_te1_" if hasattr(pipeline, "text_encoder_2") else "lora_te_"
    state = {}
    for name, (down, up, alpha) in [*unet.items(), *text.items()]:
        inner = f"text_model.{name.removeprefix('text_model.')}"
        key = f"lora_unet_{flat_name(name)}" if name in unet else first + flat_name(inner)
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = alpha
    save_file(state, path)
    return {"unet": unet, "text_encoder": text}


def test_a_kohya_file_has_the_strength_of_each_module(family: Family, tmp_path: Path) -> None:
    made = kohya(family, tmp_path / "kohya.safetensors")
    ours, before = merged(family, tmp_path / "kohya.safetensors"), family.pipeline()
    assert_changed_by(ours.unet, before.unet, made["unet"])
    assert_changed_by(ours.text_encoder, before.text_encoder, made["text_encoder"])


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
def test_exports_keep_the_strength_of_each_module(to: str, family: Family, tmp_path: Path) -> None:
    """Through our own reader, and fused by the stock pipeline as its users load it."""
    made = kohya(family, tmp_path / "kohya.safetensors")
    base = ("--base", family.folder)
    out = export(tmp_path / "kohya.safetensors", to, tmp_path / "out.safetensors", *base)
    before = family.pipeline()
    assert_changed_by(merged(family, out).unet, before.unet, made["unet"])
    stock = family.pipeline(out)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert_changed_by(stock.unet, before.unet, made["unet"])
    assert_changed_by(stock.text_encoder, before.text_encoder, made["text_encoder"])


@pytest.mark.parametrize(
    ("prefix", "halves"),
    [
        ("unet.", ("lora_down", "lora_up")),
        ("diffusion_model.", ("lora_A", "lora_B")),
        ("diffusion_model.", ("lora_down", "lora_up")),
        ("model.diffusion_model.", ("lora_A.default", "lora_B.default")),
    ],
)
@pytest.mark.parametrize("original", [True, False])
def test_names_with_dots(
    prefix: str, halves: tuple[str, str], original: bool, family: Family, tmp_path: Path
) -> None:
    """As OneTrainer writes them, and trainers for ComfyUI."""
    pipeline = family.pipeline()
    made = matrices(pipeline.unet, LAYERS)
    names = unet_names(name for name, _ in pipeline.unet.named_modules())
    state = {}
    for name, (down, up, alpha) in made.items():
        key = prefix + (names[name] if original else name)
        state |= {f"{key}.{halves[0]}.weight": down, f"{key}.{halves[1]}.weight": up}
        state[f"{key}.alpha"] = alpha
    save_file(state, tmp_path / "dots.safetensors")
    ours = merged(family, tmp_path / "dots.safetensors")
    assert_changed_by(ours.unet, pipeline.unet, made)


def peft_folder(folder: Path, made: dict[str, tuple[Tensor, ...]], **config: object) -> Path:
    """Write a folder of peft with a pattern of alphas."""
    folder.mkdir(parents=True)
    state = {}
    for name, (down, up, _) in made.items():
        state[f"base_model.model.{name}.lora_A.weight"] = down
        state[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(state, folder / "adapter_model.safetensors")
    patterns = {name: float(alpha) for name, (_, _, alpha) in made.items()}
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": patterns}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder


def test_a_folder_of_peft(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    before = family.pipeline()
    made = matrices(before.unet, LAYERS)
    folder = peft_folder(tmp_path / "one", made)
    assert_changed_by(merged(family, folder).unet, before.unet, made)
    file = folder / "adapter_model.safetensors"
    assert_changed_by(merged(family, file).unet, before.unet, made)
    scaled = peft_folder(tmp_path / "rs", made, use_rslora=True)
    by_root = {n: (d, u, a * len(d) ** 0.5) for n, (d, u, a) in made.items()}
    assert_changed_by(merged(family, scaled).unet, before.unet, by_root)


def test_folders_of_peft_by_component(tiny_folder: str, tmp_path: Path) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    before = family.pipeline()
    made = matrices(before.unet, LAYERS)
    encoder = before.text_encoder
    text = matrices(encoder, {text_name(encoder, n): x for n, x in TEXT_LAYERS.items()})
    peft_folder(tmp_path / "both" / "unet", made)
    peft_folder(tmp_path / "both" / "text_encoder", text)
    ours = merged(family, tmp_path / "both")
    assert_changed_by(ours.unet, before.unet, made)
    assert_changed_by(ours.text_encoder, before.text_encoder, text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "is of a DoRA, which is not a plain LoRA"),
        ({"peft_type": "LOHA"}, "is of a LOHA, which is not a plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4, which changes"),
        ({"alpha_pattern": {"to_q": "much"}}, "configuration of alphas is not one"),
        ({"alpha_pattern": {}, "lora_alpha": float("nan")}, "the alpha of .* is nan"),
    ],
)
def test_peft_adapters_that_are_no_plain_lora(
    config: dict[str, object], message: str, tiny_folder: str, tmp_path: Path
) -> None:
    unet = Family(StableDiffusionPipeline, tiny_folder).pipeline().unet
    folder = peft_folder(tmp_path / "peft", matrices(unet, LAYERS), **config)
    with pytest.raises(InputError, match=message):
        read_lora(folder)


def test_a_peft_file_without_its_configuration(tiny_folder: str, tmp_path: Path) -> None:
    unet = Family(StableDiffusionPipeline, tiny_folder).pipeline().unet
    folder = peft_folder(tmp_path / "peft", matrices(unet, LAYERS))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"whose alpha is in adapter_config.json: copy that file"):
        read_lora(folder)


def test_embeddings_beside_a_lora_are_said(tiny_xl_folder: str, tmp_path: Path) -> None:
    """OneTrainer bundles them."""
    family = Family(StableDiffusionXLPipeline, tiny_xl_folder)
    file = tmp_path / "bundle.safetensors"
    made = kohya(family, file)
    bundled = {
        "bundle_emb.fox.clip_l": torch.ones(1, 32),
        "bundle_emb.fox.clip_g": torch.ones(1, 24),
    }
    save_file(load_file(file) | bundled, file)
    with pytest.warns(UserWarning, match="also contains the embeddings fox, which are not read"):
        ours = merged(family, file)
    assert_changed_by(ours.unet, family.pipeline().unet, made["unet"])


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{KEY}.dora_scale", "contains a DoRA"),
        (f"{KEY}.lora_mid.weight", "a Tucker decomposition"),
        ("lycoris_mid_block_resnets_0_conv1.lokr_w1", "contains a LoKr"),
        (f"{KEY}.hada_w1_a", "contains a LoHa"),
        (f"{KEY}.diff", "contains a difference of weights"),
        (f"{KEY}.lora_up.bias", "contains a LoRA with biases"),
        (f"{KEY}.scalar", "is in no layout of a plain LoRA"),
    ],
)
def test_other_adapters_are_named(key: str, message: str, tiny_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    kohya(Family(StableDiffusionPipeline, tiny_folder), file)
    save_file(load_file(file) | {key: torch.ones(2, 2)}, file)
    with pytest.raises(InputError, match=message) as stop:
        read_lora(file)
    assert len(str(stop.value)) < 400 + len(str(file))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["alpha", "lora_up.weight", "lora_down.weight"])
def test_a_lora_that_is_not_finite_is_refused_by_all(
    half: str, value: float, tiny_folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    kohya(Family(StableDiffusionPipeline, tiny_folder), file)
    state = load_file(file)
    state[f"{KEY}.{half}"].view(-1)[0] = value
    save_file(state, file)
    with pytest.raises(InputError, match="contains NaN, infinite"):
        read_lora(file)
    to = ("--to", "kohya", "--output", tmp_path / "out.safetensors", "--base", tiny_folder)
    assert "contains NaN, infinite" in refused("--source", file, *to)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_two_kernels_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    """A layer of two convolutions with kernels is not the product of two matrices."""
    file = tmp_path / "lora.safetensors"
    kohya(Family(StableDiffusionPipeline, tiny_folder), file)
    key = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
    save_file(load_file(file) | {key: torch.ones(32, 3, 3, 3)}, file)
    with pytest.raises(InputError, match="the two matrices of its layer .* do not fit"):
        read_lora(file)

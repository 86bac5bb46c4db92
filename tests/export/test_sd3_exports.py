"""Exports of Stable Diffusion 3 and 3.5: what diffusers reads back has the trained weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from lit_prefopt.families import SD3
from lit_prefopt.weights.component_files import original_state
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import match_lora, merge_lora
from tests.helpers.exporting import add_random_adapter, export, metadata, picture, refused
from tests.helpers.tiny import tiny_text_config
from tests.helpers.tiny_sd3 import SD35, load_stock_sd3, tiny_sd3_pipeline

POOLED = {"pooled_projection_dim": 32 + 20, "num_layers": 3}
TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn2.to_q", "attn2.to_v"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "norm1.linear", "norm1_context.linear", "norm_out.linear"),
]
RANK, ALPHA = 4, 6.0


@pytest.fixture(params=["sd3", "sd35"], scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a pipeline whose CLIP-L has the identity as projection, as the published ones."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = POOLED | (SD35 if request.param == "sd35" else {})
    pipeline = load_stock_sd3(tiny_sd3_pipeline(folder / "first", **changes))
    config = tiny_text_config(pipeline.tokenizer, projection_dim=32, max_position_embeddings=77)
    pipeline.text_encoder = CLIPTextModelWithProjection(config)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(folder / "base")
    return str(folder / "base")


@pytest.fixture
def stock(base: str) -> StableDiffusion3Pipeline:
    return load_stock_sd3(base)


def write_adapter(pipeline: StableDiffusion3Pipeline, folder: Path, *, text: bool = False) -> Path:
    """Write a random LoRA as diffusers' training script does; the pipeline keeps the adapter."""
    parts: dict[str, nn.Module] = {"transformer": pipeline.transformer}
    add_random_adapter(pipeline.transformer, RANK, ALPHA, TARGETS)
    if text:
        for name in ("text_encoder", "text_encoder_2"):
            parts[name] = getattr(pipeline, name)
            add_random_adapter(parts[name], RANK, ALPHA, ["q_proj", "out_proj", "fc1"])
    layers = {f"{n}_lora_layers": get_peft_model_state_dict(net) for n, net in parts.items()}
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder / "pytorch_lora_weights.safetensors"


def deltas(file: Path, stock: StableDiffusion3Pipeline) -> dict[tuple[str, str], Tensor]:
    """Return the updates of all layers of a LoRA file, by component and layer."""
    parts = {
        name: getattr(stock, name) for name in ("transformer", *(e.name for e in SD3.encoders))
    }
    found = match_lora(SD3, parts, read_lora(file))
    return {key: layer.delta for key, layer in found.items()}


def assert_close_deltas(
    ours: dict[tuple[str, str], Tensor], theirs: dict[tuple[str, str], Tensor]
) -> None:
    assert ours.keys() == theirs.keys()
    for key, delta in theirs.items():
        torch.testing.assert_close(ours[key], delta, atol=1e-6, rtol=1e-6)


def assert_equal_parts(ours: object, theirs: object) -> None:
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    for name in names:
        a, b = (getattr(pipeline, name).state_dict() for pipeline in (ours, theirs))
        assert a.keys() == b.keys()
        assert [key for key in b if not torch.equal(a[key], b[key])] == [], name


def test_a_single_file_is_read_back_by_diffusers(
    base: str, stock: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    file = export(Path(base), "single-file", tmp_path / "out.safetensors")
    loaded = StableDiffusion3Pipeline.from_single_file(str(file), config=base)
    assert_equal_parts(loaded, stock)
    state, facts = load_file(file), metadata(file)
    size = 3 * 32
    assert state["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].shape == (size, 32)
    assert state["text_encoders.t5xxl.transformer.shared.weight"].ndim == 2
    dual = any("attn2" in key for key in state)
    name = "stable-diffusion-3-5-medium" if dual else "stable-diffusion-3-medium"
    assert facts["modelspec.architecture"] == name
    assert not any("prediction" in key or key.startswith("ss_") for key in facts)


def test_a_lora_is_merged_into_a_single_file_and_read_by_us(
    base: str, stock: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    merged = copy.deepcopy(stock)
    lora = write_adapter(stock, tmp_path / "lora", text=True)
    encoders = {part.name: getattr(merged, part.name) for part in SD3.encoders}
    merge_lora(SD3, merged.transformer, encoders, read_lora(lora))
    file = export(lora, "single-file", tmp_path / "out.safetensors", "--base", base)
    assert_equal_parts(StableDiffusion3Pipeline.from_single_file(str(file), config=base), merged)
    torch.testing.assert_close(picture(merged), picture(stock), atol=1e-4, rtol=0)
    again = ("--base", str(file), "--base_config", base, "--plus", "none")
    folder = export(file.parent / "lora", "pipeline", tmp_path / "again", *again)
    twice = {part.name: getattr(merged, part.name) for part in SD3.encoders}
    merge_lora(SD3, merged.transformer, twice, read_lora(lora))
    assert_equal_parts(load_stock_sd3(folder), merged)


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya", "comfyui"])
def test_a_lora_comes_back_with_its_strength(
    base: str, stock: StableDiffusion3Pipeline, to: str, tmp_path: Path
) -> None:
    plain = picture(stock)
    before = copy.deepcopy(stock)
    lora = write_adapter(stock, tmp_path / "trained", text=True)
    out = export(lora, to, tmp_path / "out.safetensors", "--base", base)
    assert_close_deltas(deltas(out, before), deltas(lora, before))
    back = export(out, "diffusers-lora", tmp_path / "back.safetensors", "--base", base)
    first, second = load_file(lora), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    before.load_lora_weights(back.parent, weight_name=back.name)
    ours, theirs = picture(before), picture(stock)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (theirs - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("to", "start", "ends"),
    [
        ("kohya", "lora_unet_", ("lora_down", "lora_up")),
        ("comfyui", "diffusion_model.", ("lora_A", "lora_B")),
    ],
)
def test_original_names_mean_what_diffusers_reads_in_them(
    base: str,
    stock: StableDiffusion3Pipeline,
    to: str,
    start: str,
    ends: tuple[str, str],
    tmp_path: Path,
) -> None:
    """The updates of a file, put into a checkpoint, are those of the layers by diffusers' map."""
    before = copy.deepcopy(stock)
    lora = write_adapter(stock, tmp_path / "trained", text=True)
    out = load_file(export(lora, to, tmp_path / "out.safetensors", "--base", base))
    state = original_state(before.transformer, SD3.denoiser)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    dot = "_" if to == "kohya" else "."
    spelt = {key.removeprefix("model.diffusion_model.").replace(".", dot): key for key in zeros}
    for key in [key for key in out if key.startswith(start) and key.endswith(f".{ends[0]}.weight")]:
        name = key.removesuffix(f".{ends[0]}.weight")
        down, up, alpha = out[key], out[f"{name}.{ends[1]}.weight"], out[f"{name}.alpha"]
        weight = spelt[f"{name.removeprefix(start)}{dot}weight"]
        zeros[weight] = (alpha / len(down) * (up @ down)).reshape(zeros[weight].shape)
    assert any("x_block.attn.qkv" in key and x.abs().sum() for key, x in zeros.items())
    read = convert_sd3_transformer_checkpoint_to_diffusers(zeros)
    expected = {n: x for (part, n), x in deltas(lora, before).items() if part == "transformer"}
    for name, tensor in read.items():
        wanted = expected.pop(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(tensor, wanted.expand_as(tensor), atol=1e-6, rtol=1e-6)
    assert not expected
    texts = {key.split(".lora_")[0] for key in out if not key.startswith(start)}
    layer = "text_model.encoder.layers.1.self_attn.q_proj"
    if to == "kohya":
        assert {f"lora_te{i}_{layer.replace('.', '_')}" for i in (1, 2)} <= texts
    else:
        assert {f"text_encoders.clip_{i}.transformer.{layer}" for i in "lg"} <= texts


def kohya_lora(pipeline: StableDiffusion3Pipeline, file: Path) -> dict[str, Tensor]:
    """Write a LoRA of all three text encoders and of fused layers, as sd-scripts names them."""
    generator = torch.Generator().manual_seed(7)
    layers = {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (96, 32, 4, 2.0),
        "lora_unet_joint_blocks_2_context_block_attn_qkv": (96, 32, 2, 2.0),
        "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1": (64, 32, 3, 1.5),
        "lora_unet_joint_blocks_1_x_block_mlp_fc1": (128, 32, 4, 8.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 32, 2, 1.0),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (24, 24, 2, 1.0),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (64, 64, 2, 1.0),
    }
    state = {}
    for name, (outputs, inputs, rank, alpha) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, file)
    return state


def test_a_foreign_kohya_lora_is_read_whole(
    base: str, stock: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    state = kohya_lora(stock, tmp_path / "kohya.safetensors")
    found = deltas(tmp_path / "kohya.safetensors", stock)

    def delta(name: str) -> Tensor:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        return state[f"{name}.alpha"] / len(down) * (up @ down)

    thirds = delta("lora_unet_joint_blocks_0_x_block_attn_qkv").chunk(3)
    for name, third in zip(("to_q", "to_k", "to_v"), thirds, strict=True):
        own = found.pop(("transformer", f"transformer_blocks.0.attn.{name}"))
        torch.testing.assert_close(own, third)
    thirds = delta("lora_unet_joint_blocks_2_context_block_attn_qkv").chunk(3)
    for name, third in zip(("add_q_proj", "add_k_proj", "add_v_proj"), thirds, strict=True):
        own = found.pop(("transformer", f"transformer_blocks.2.attn.{name}"))
        torch.testing.assert_close(own, third)
    shift, scale = delta("lora_unet_joint_blocks_2_context_block_adaLN_modulation_1").chunk(2)
    own = found.pop(("transformer", "transformer_blocks.2.norm1_context.linear"))
    torch.testing.assert_close(own, torch.cat([scale, shift]))
    assert {part for part, _ in found} == {"transformer", *(part.name for part in SD3.encoders)}
    assert len(found) == 4
    again = export(
        tmp_path / "kohya.safetensors", "kohya", tmp_path / "again.safetensors", "--base", base
    )
    written = load_file(again)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    facts = metadata(again)
    assert facts["ss_network_module"] == "networks.lora_sd3"
    assert facts["ss_network_alpha"] == "Dynamic"
    more = ("--source", tmp_path / "kohya.safetensors", "--to", "diffusers-lora", "--base", base)
    message = refused(*more, "--output", tmp_path / "diffusers.safetensors")
    assert "no LoRA of the text_encoder_3" in message


def test_a_transformer_without_t5(
    tiny_sd35_without_t5_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = load_stock_sd3(tiny_sd35_without_t5_folder)
    lora = write_adapter(stock, tmp_path / "lora")
    base = ("--base", tiny_sd35_without_t5_folder)
    folder = export(lora, "transformer", tmp_path / "transformer", *base)
    merged = load_stock_sd3(tiny_sd35_without_t5_folder)
    merge_lora(SD3, merged.transformer, {}, read_lora(lora))
    loaded = type(merged.transformer).from_pretrained(folder).state_dict()
    state = merged.transformer.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    whole = load_stock_sd3(export(lora, "pipeline", tmp_path / "pipeline", *base))
    assert whole.text_encoder_3 is None
    assert "FOLDER, text_encoder_3=None, tokenizer_3=None)" in capsys.readouterr().out
    torch.testing.assert_close(picture(whole), picture(stock), atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="text_projection.weight is not the identity"):
        file = export(lora, "single-file", tmp_path / "out.safetensors", *base)
    assert not any("t5xxl" in key for key in load_file(file))
    further = ("--base", str(file), "--base_config", tiny_sd35_without_t5_folder)
    back = load_stock_sd3(export(Path(folder), "pipeline", tmp_path / "back", *further))
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        ours, theirs = (getattr(p, name).state_dict() for p in (back, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_folder_whose_t5_was_not_copied(base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("*_3"))
    lora = write_adapter(load_stock_sd3(base), tmp_path / "lora")
    folder = export(lora, "pipeline", tmp_path / "out", "--base", str(tmp_path / "copy"))
    assert load_stock_sd3(folder).text_encoder_3 is None


def test_refusals_name_the_cure(base: str, tiny_folder: str, tmp_path: Path) -> None:
    stock = load_stock_sd3(base)
    lora = write_adapter(stock, tmp_path / "lora")
    out = ("--output", tmp_path / "out", "--source", lora)
    assert "export it with `--to transformer`" in refused(*out, "--to", "unet", "--base", base)
    message = refused("--output", tmp_path / "out", "--source", base, "--to", "unet")
    assert "export it with `--to transformer`" in message
    message = refused(*out, "--to", "unet", "--base", tiny_folder)
    assert "another model family" in message
    message = refused("--output", tmp_path / "o", "--source", tiny_folder, "--to", "transformer")
    assert "export it with `--to unet`" in message

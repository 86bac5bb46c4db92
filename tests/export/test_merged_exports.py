"""Merged weights on their way out: UNet, pipeline, and a single file that diffusers reads back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

from tests.helpers.exporting import (
    Family,
    export,
    metadata,
    picture,
    prediction,
    refused,
    write_lora,
)
from tests.helpers.tiny import tiny_pipeline, tiny_text_config, tiny_vae, tiny_xl_pipeline

UNET = {"use_linear_projection": True}


def complete(folder: Path, kind: type[DiffusionPipeline], **text: object) -> Family:
    """Give a tiny pipeline what the large ones have: attention in its VAE, blocks of two layers."""
    pipeline = kind.from_pretrained(folder)
    torch.manual_seed(3)
    latents = pipeline.vae.config
    options = {"scaling_factor": latents.scaling_factor, "force_upcast": latents.force_upcast}
    pipeline.vae = tiny_vae(mid_block_add_attention=True, layers_per_block=2, **options)
    if text:
        pipeline.text_encoder = CLIPTextModel(tiny_text_config(pipeline.tokenizer, **text))
    for part in (p for p in pipeline.components.values() if isinstance(p, nn.Module)):
        for parameter in part.parameters():  # norms and biases too, which begin as ones and zeros
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder / "complete")
    return Family(kind, str(folder / "complete"))


@pytest.fixture(params=["sd1", "sd2", "sdxl"], scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Pipelines of the three families with all the layers that the large ones have."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sdxl":
        unet = {"layers_per_block": 2}
        return complete(tiny_xl_pipeline(folder, **unet), StableDiffusionXLPipeline)
    second = request.param == "sd2"
    unet = {"layers_per_block": 2, "use_linear_projection": second}
    text = {"hidden_act": "gelu"} if second else {"hidden_act": "quick_gelu"}
    return complete(tiny_pipeline(folder, **unet), StableDiffusionPipeline, **text)


def assert_equal_parts(ours: DiffusionPipeline, theirs: DiffusionPipeline) -> None:
    """Every weight of every part is the same to the last bit."""
    parts = {n for n, part in theirs.components.items() if isinstance(part, nn.Module)}
    assert {"unet", "vae", "text_encoder"} <= parts
    for name in parts:
        a, b = (getattr(pipeline, name).state_dict() for pipeline in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def from_single_file(family: Family, file: Path) -> DiffusionPipeline:
    """What diffusers' own conversion makes of the file."""
    pipeline = family.kind.from_single_file(str(file), config=family.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_single_file_comes_back_to_the_last_bit(whole: Family, tmp_path: Path) -> None:
    out = export(Path(whole.folder), "single-file", tmp_path / "model.safetensors")
    ours, theirs = from_single_file(whole, out), whole.pipeline()
    assert_equal_parts(ours, theirs)
    assert torch.equal(picture(ours), picture(theirs))
    parameters = sum(
        p.numel()
        for part in theirs.components.values()
        if isinstance(part, nn.Module)
        for p in part.parameters()
    )
    assert sum(tensor.numel() for tensor in load_file(out).values()) == parameters


def test_merged_weights_make_the_same_image(whole: Family, tmp_path: Path) -> None:
    text = whole.kind is StableDiffusionXLPipeline
    lora = write_lora(whole, tmp_path / "lora", text=text)
    base = ("--base", whole.folder)
    folder = export(lora, "pipeline", tmp_path / "pipeline", *base)
    file = export(lora, "single-file", tmp_path / "model.safetensors", *base)
    expected = picture(whole.pipeline(lora))
    merged = Family(whole.kind, str(folder)).pipeline()
    torch.testing.assert_close(picture(merged), expected, atol=1e-4, rtol=0)
    assert_equal_parts(from_single_file(whole, file), merged)
    assert (expected - picture(whole.pipeline())).abs().max() > 1e-2


def test_merged_unet(family: Family, tmp_path: Path) -> None:
    lora = write_lora(family, tmp_path / "lora")
    folder = export(lora, "unet", tmp_path / "unet", "--base", family.folder)
    pipeline = family.pipeline()
    pipeline.unet = UNet.from_pretrained(folder)
    stock = prediction(family.pipeline(lora))
    torch.testing.assert_close(prediction(pipeline), stock, atol=1e-5, rtol=1e-5)
    # and on from there, now without a LoRA
    base = ("--base", family.folder, "--dtype", "float16")
    half = export(folder, "single-file", tmp_path / "model.safetensors", *base)
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}


def test_original_names(tmp_path: Path) -> None:
    """Names of the released files, which diffusers' conversion does not ask for one by one."""
    sd2 = complete(tiny_pipeline(tmp_path / "2"), StableDiffusionPipeline, hidden_act="gelu")
    out = export(Path(sd2.folder), "single-file", tmp_path / "sd2.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(out).items()}
    vae = "first_stage_model.decoder"
    assert shapes[f"{vae}.mid.attn_1.q.weight"] == (16, 16, 1, 1)
    assert shapes[f"{vae}.up.2.upsample.conv.bias"] == (16,)  # counted from the image
    text = "cond_stage_model.model"
    assert shapes[f"{text}.transformer.resblocks.1.attn.in_proj_weight"] == (96, 32)
    assert shapes[f"{text}.positional_embedding"] == (16, 32)
    unet = "model.diffusion_model"
    assert shapes[f"{unet}.input_blocks.2.0.op.weight"] == (16, 16, 3, 3)
    assert shapes[f"{unet}.output_blocks.1.2.conv.weight"] == (32, 32, 3, 3)
    assert metadata(out)["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_sdxl_files_tell_that_they_predict_v(tmp_path: Path) -> None:
    folder = tiny_xl_pipeline(tmp_path / "xl", prediction="v_prediction", sample_size=None)
    out = export(folder, "single-file", tmp_path / "model.safetensors")
    assert load_file(out)["v_pred"].numel() == 0
    assert metadata(out)["modelspec.prediction_type"] == "v"
    assert "modelspec.resolution" not in metadata(out)  # nothing tells it here
    family = Family(StableDiffusionXLPipeline, str(folder))
    assert_equal_parts(from_single_file(family, out), family.pipeline())


def test_a_single_file_is_a_base_too(family: Family, tmp_path: Path) -> None:
    file = export(Path(family.folder), "single-file", tmp_path / "base.safetensors")
    lora = write_lora(family, tmp_path / "lora")
    base = ("--base", str(file), "--base_config", family.folder)
    out = export(lora, "single-file", tmp_path / "out.safetensors", *base)
    ours, theirs = from_single_file(family, out), family.pipeline(lora)
    torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)


def test_refusals(tiny_folder: str, tiny_xl_folder: str, tmp_path: Path) -> None:
    unet = ("--source", f"{tiny_folder}/unet", "--to")
    file = ("--output", tmp_path / "x.safetensors")
    assert "not a LoRA: export it to unet" in refused(*unet, "kohya", *file)
    assert "name it as `--base`" in refused(*unet, "single-file", *file)
    other = ("--base", tiny_xl_folder)
    assert "The unet's cross_attention_dim is 32" in refused(*unet, "single-file", *file, *other)
    assert "omit `--plus`" in refused(*unet, "unet", "--output", tmp_path / "x", "--plus", "x")
    (tmp_path / "full").mkdir()
    assert "exists; remove it" in refused(*unet, "unet", "--output", tmp_path / "full")
    assert "x.safetensors does not exist" in refused(
        *unet, "single-file", *file, "--base", "x.safetensors"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_a_distilled_unet_has_no_single_file(tmp_path: Path) -> None:
    lcm = tiny_pipeline(tmp_path / "lcm", time_cond_proj_dim=8)
    index = lcm / "model_index.json"
    name = "LatentConsistencyModelPipeline"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", name))
    to = ("--source", lcm, "--output")
    file = tmp_path / "x.safetensors"
    assert "the original layout does not support" in refused(*to, file, "--to", "single-file")
    out = export(lcm, "pipeline", tmp_path / "out")
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == name


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_a_base_without_its_weights_is_refused(
    single: bool, tiny_folder: str, tmp_path: Path
) -> None:
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = write_lora(family, tmp_path / "lora")
    base = ("--base", str(lora), "--base_config", tiny_folder)
    if not single:
        shutil.copytree(tiny_folder, tmp_path / "base")
        weights = tmp_path / "base" / "text_encoder" / "model.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
        base = ("--base", str(tmp_path / "base"))
    out = ("--to", "pipeline", "--output", tmp_path / "out")
    told = "has no unet under names" if single else "no text_encoder that can be loaded"
    assert told in refused("--source", lora, *out, *base)
    assert not (tmp_path / "out").exists()

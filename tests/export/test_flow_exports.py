"""Exports of flow families: the stock pipeline gives the same image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ZImageTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prefopt.backbones.single_file_components import open_components
from lit_prefopt.weights.component_files import original_state
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora
from tests.helpers.exporting import add_random_adapter, export, picture, refused
from tests.helpers.flow_families import FLOW_FAMILIES, FlowFamily

# diffusers 0.42 splits the fused layer of FLUX.1's single blocks at the published width alone
DOUBLE = [
    f"transformer_blocks.0.{layer}"
    for layer in ("attn.to_q", "attn.to_k", "attn.add_v_proj", "attn.to_out.0", "ff.net.2")
]
TARGETS = {
    "flux1": DOUBLE,
    "chroma": DOUBLE,
    "flux2": ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_qkv_mlp_proj", "ff.linear_in"],
    "qwen-image": ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "img_mlp.net.0.proj", "img_in"],
    "z-image": ["attention.to_q", "attention.to_v", "attention.to_out.0", "feed_forward.w2"],
    "lumina2": ["attn.to_q", "attn.to_v", "attn.to_out.0", "feed_forward.linear_2", "norm1.linear"],
}
RANK, ALPHA = 4, 6.0
CLOSE = {"atol": 1e-4, "rtol": 0}


class Trained(NamedTuple):
    """A family with a small pipeline and a LoRA for it."""

    name: str
    case: FlowFamily
    folder: str
    lora: Path
    plain: Tensor  # an image without the LoRA
    image: Tensor  # the same with it

    def stock(self, folder: Path | str | None = None) -> DiffusionPipeline:
        pipeline = self.case.pipeline.from_pretrained(folder or self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def merged(self, times: int = 1) -> dict[str, Tensor]:
        """Return the transformer's weights with the LoRA added one or more times."""
        net = self.stock().transformer
        for _ in range(times):
            merge_lora(self.case.names, net, {}, read_lora(self.lora))
        return net.state_dict()


@pytest.fixture(params=FLOW_FAMILIES, scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, case = request.param, FLOW_FAMILIES[request.param]
    place = tmp_path_factory.mktemp(name)
    folder = case.write(place / "base")
    pipeline = case.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    plain = picture(pipeline)
    add_random_adapter(pipeline.transformer, RANK, ALPHA, TARGETS[name])
    case.pipeline.save_lora_weights(
        place / "lora",
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        **_collate_lora_metadata({"transformer": pipeline.transformer}),
    )
    lora = place / "lora" / "pytorch_lora_weights.safetensors"
    return Trained(name, case, str(folder), lora, plain, picture(pipeline))


def test_the_lora_changes_the_image(trained: Trained) -> None:
    assert (trained.image - trained.plain).abs().max() > 1e-2


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya", "comfyui"])
def test_a_lora_in_the_stock_pipeline(trained: Trained, to: str, tmp_path: Path) -> None:
    """It reads all of these but FLUX.2's of ComfyUI, where it refuses an alpha, and Lumina's.

    Of Lumina Image 2.0 it finds nothing in kohya's names, and in ComfyUI's it needs all layers of
    all blocks, at the published width.
    """
    out = export(trained.lora, to, tmp_path / "out.safetensors", "--base", trained.folder)
    back = export(out, "diffusers-lora", tmp_path / "back.safetensors", "--base", trained.folder)
    first, second = load_file(trained.lora), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    stock = trained.stock()
    if (trained.name, to) == ("flux2", "comfyui"):
        with pytest.raises(ValueError, match=r"should be empty at this point .*alpha"):
            stock.load_lora_weights(tmp_path, weight_name=out.name)
        return
    if (trained.name, to) == ("lumina2", "comfyui"):
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            stock.load_lora_weights(tmp_path, weight_name=out.name)
        return
    stock.load_lora_weights(tmp_path, weight_name=out.name)
    if (trained.name, to) == ("lumina2", "kohya"):
        assert torch.equal(picture(stock), trained.plain)
        return
    torch.testing.assert_close(picture(stock), trained.image, **CLOSE)


def test_merged_weights_in_the_stock_pipeline(trained: Trained, tmp_path: Path) -> None:
    base = ("--base", trained.folder)
    whole = export(trained.lora, "pipeline", tmp_path / "pipeline", *base)
    torch.testing.assert_close(picture(trained.stock(whole)), trained.image, **CLOSE)
    alone = export(trained.lora, "transformer", tmp_path / "transformer", *base)
    state, wanted = trained.case.kind.from_pretrained(alone).state_dict(), trained.merged()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_a_single_file_comes_back(trained: Trained, tmp_path: Path) -> None:
    """With every network of the pipeline in it."""
    base = ("--base", trained.folder)
    file = export(trained.lora, "single-file", tmp_path / "out.safetensors", *base)
    starts = {key.split(".")[0] for key in load_file(file)}
    assert starts == {"model", "vae", "text_encoders"}
    again = ("--base", str(file), "--base_config", trained.folder)
    ours = trained.stock(export(trained.lora, "pipeline", tmp_path / "again", *again))
    first = trained.stock()
    for part in ("vae", "text_encoder", "text_encoder_2"):
        net = getattr(first, part, None)
        if net is not None:
            state = getattr(ours, part).state_dict()
            assert all(torch.equal(state[key], x) for key, x in net.state_dict().items())
    state, wanted = ours.transformer.state_dict(), trained.merged(times=2)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    if trained.name == "z-image":  # of the others' files diffusers 0.42 does not read small ones
        wanted = trained.merged()
        net = ZImageTransformer2DModel.from_single_file(
            str(file), config=trained.folder, subfolder="transformer"
        )
        assert all(torch.equal(net.state_dict()[key], wanted[key]) for key in wanted)
        vae = AutoencoderKL.from_single_file(str(file), config=trained.folder, subfolder="vae")
        wanted = first.vae.state_dict()
        assert all(torch.equal(vae.state_dict()[key], wanted[key]) for key in wanted)


def test_a_file_of_the_transformer_alone_is_a_model(trained: Trained, tmp_path: Path) -> None:
    """In original names without a prefix; all else comes from the pipeline that is named."""
    stock, family = trained.stock(), trained.case.names
    start = family.denoiser.prefixes[0]
    original = original_state(stock.transformer, family.denoiser)
    file = tmp_path / "alone.safetensors"
    save_file({key.removeprefix(start): x.contiguous() for key, x in original.items()}, file)
    names = [part.name for part in family.encoders]
    options = {"variant": None, "config": trained.folder, "vae": None}
    parts = open_components(family, str(file), names, **options)
    loaded = {"transformer": parts.denoiser(torch.float32), "vae": parts.vae(torch.float32)}
    loaded |= {name: parts.text_encoder(name, torch.float32) for name in names}
    for name, net in loaded.items():
        wanted = getattr(stock, name).state_dict()
        state = net.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_the_pipeline_of_a_single_file_is_named(trained: Trained, tmp_path: Path) -> None:
    """Diffusers takes FLUX.2 klein for dev, Z-Image for Turbo, Qwen-Image for SD 1.x."""
    if trained.name in ("flux1", "chroma", "lumina2"):
        pytest.skip("of a file of these diffusers finds the right pipeline, on the hub")
    file = export(
        trained.lora, "single-file", tmp_path / "out.safetensors", "--base", trained.folder
    )
    to = ("--to", "pipeline", "--output", tmp_path / "again")
    message = refused("--source", trained.lora, *to, "--base", file)
    assert "models of its family differ in" in message
    assert "--base_config" in message


def test_a_lora_of_another_flow_family(trained: Trained, tmp_path: Path) -> None:
    # layers of Chroma's blocks have the names and sizes of FLUX.1's
    alike = {trained.name, "flux1"} if trained.name == "chroma" else {trained.name}
    other = next(name for name in FLOW_FAMILIES if name not in alike)
    folder = FLOW_FAMILIES[other].write(tmp_path / "other")
    to = ("--to", "kohya", "--output", tmp_path / "out.safetensors")
    message = refused("--source", trained.lora, *to, "--base", folder)
    assert "is a LoRA of another model family" in message

"""Backbones from one .safetensors file, against the folder that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.commands.export import export
from lit_prefopt.errors import InputError
from tests.helpers.tiny import tiny_pipeline

Made = tuple[type[UNetBackbone], str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str, tiny_xl_folder: str) -> dict:
    """A family, a folder, and the single file that was made of it."""
    root = tmp_path_factory.mktemp("files")
    v = str(tiny_pipeline(root / "v", "v_prediction"))
    families = {
        "1.x": (StableDiffusion, tiny_folder),
        "v": (StableDiffusion, v),
        "sdxl": (StableDiffusionXL, tiny_xl_folder),
    }
    for name, (_, folder) in families.items():
        export(folder, "single-file", str(root / f"{name}.safetensors"))
    return {n: (kind, f, str(root / f"{n}.safetensors")) for n, (kind, f) in families.items()}


@pytest.mark.parametrize("name", ["1.x", "v", "sdxl"])
def test_it_is_the_model_of_its_folder(files: dict[str, Made], name: str) -> None:
    family, folder, file = files[name]
    ours, theirs = family(file, config=folder), family(folder)
    assert ours.process.prediction == theirs.process.prediction
    a, b = ours.state_dict(), theirs.state_dict()
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    ours, theirs = (one.embed(["a cat", ""]).tensors() for one in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_precision_and_adapter(files: dict[str, Made]) -> None:
    family, folder, file = files["sdxl"]
    backbone = family(file, config=folder, lora=LoRA(4), dtype="bfloat16")
    for name, parameter in backbone.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora" in name else torch.bfloat16), name


def test_a_vae_of_ones_own_stands_in(files: dict[str, Made], tmp_path: Path) -> None:
    family, folder, file = files["1.x"]
    without = {k: v for k, v in load_file(file).items() if not k.startswith("first_stage_model.")}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(InputError, match="has no vae where StableDiffusionPipeline has it"):
        family(str(tmp_path / "without.safetensors"), config=folder)
    backbone = family(str(tmp_path / "without.safetensors"), config=folder, vae=folder)
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(backbone.encode(images)[0], family(folder).encode(images)[0])


def test_a_file_of_another_family_is_refused(files: dict[str, Made], tmp_path: Path) -> None:
    (_, folder, file), (_, xl_folder, xl_file) = files["1.x"], files["sdxl"]
    with pytest.raises(InputError, match="has no text_encoder where"):
        StableDiffusion(xl_file, config=folder)
    with pytest.raises(InputError, match="has no text_encoder and no text_encoder_2 where"):
        StableDiffusionXL(file, config=xl_folder)
    with pytest.raises(InputError, match="is a StableDiffusionXLPipeline and not"):
        StableDiffusion(file, config=xl_folder)
    save_file({"transformer_blocks.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(InputError, match="has no unet and no vae and no text_encoder"):
        StableDiffusion(str(tmp_path / "flux.safetensors"), config=folder)


def test_another_size_of_the_same_family_is_refused(files: dict[str, Made], tmp_path: Path) -> None:
    wider = tiny_pipeline(tmp_path / "wider", block_out_channels=(16, 48))
    with pytest.raises(InputError, match="does not fit the architecture of"):
        StableDiffusion(files["1.x"][2], config=str(wider))


def test_without_a_configuration_and_without_the_hub(files: dict[str, Made]) -> None:
    with pytest.raises(InputError, match="--backbone.config FOLDER"):
        StableDiffusion(files["1.x"][2])


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str, tiny_folder: str) -> None:
    torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        StableDiffusion(str(tmp_path / name), config=tiny_folder)

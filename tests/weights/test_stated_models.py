"""Metadata of LoRAs that name another model than the one that they are loaded into."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prefopt.backbones import LoRA, StableDiffusion3
from lit_prefopt.errors import InputError
from lit_prefopt.families.chroma import CHROMA
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.families.known import FAMILIES, other_model
from lit_prefopt.families.lumina2 import LUMINA2
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.families.stable_diffusion import SD1, SD2
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.families.stable_diffusion_xl import SDXL
from lit_prefopt.families.z_image import Z_IMAGE
from lit_prefopt.weights.lora_files import read_lora
from tests.helpers.exporting import export

CONFIGS = {
    "SD 1.5": (SD1, {"cross_attention_dim": 768}),
    # the backbone of both has the first family's names
    "SD 2.1": (SD1, {"cross_attention_dim": 1024}),
    "SD 2.1 in exports": (SD2, {"cross_attention_dim": 1024}),
    "SDXL": (SDXL, {}),
    "SD3 medium": (SD3, {}),
    "SD3.5 medium": (SD3, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "SD3.5 large": (SD3, {"qk_norm": "rms_norm", "dual_attention_layers": ()}),
    "FLUX.1 dev": (FLUX1, {"guidance_embeds": True}),
    "FLUX.1 schnell": (FLUX1, {"guidance_embeds": False}),
    "klein 4B": (FLUX2, {"num_attention_heads": 24}),
    "klein 9B": (FLUX2, {"num_attention_heads": 32}),
    "Qwen-Image": (QWEN_IMAGE, {}),
    "Z-Image": (Z_IMAGE, {}),
    "Chroma": (CHROMA, {}),
    "Lumina 2": (LUMINA2, {}),
}

ALIKE = [{"SD 2.1", "SD 2.1 in exports"}, {"FLUX.1 dev", "FLUX.1 schnell"}]
"""Models that take each other's LoRAs without a word."""

SHARED = {("Lumina 2", "Z-Image")}
"""Models whose names also stand in LoRAs of another one, and that other model."""


@pytest.mark.parametrize("written", CONFIGS)
def test_names_that_exports_write(written: str) -> None:
    """A model knows its own name in both forms, and other models by it."""
    family, config = CONFIGS[written]
    for v in (False, True) if family.noise == "ddpm" else (False,):
        own = SD2 if written == "SD 2.1" else family
        names = f"{own.architecture(config, v)}/lora", own.kohya_version(config, v)
        for name in names:
            for other, (theirs, stated) in CONFIGS.items():
                found = other_model([name], theirs, stated)
                same = other == written or {other, written} in ALIKE or (written, other) in SHARED
                assert (found is None) == same, (name, other, found)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("stable-diffusion-v3.5-medium", "SD3.5 medium"),
        ("flux.1", "FLUX.1 dev"),
        ("flux-1-dev/lora", "FLUX.1 schnell"),
        ("FLUX.1-Krea", "FLUX.1 dev"),
        ("flux2_klein_4b", "klein 4B"),
        ("FLUX.2-klein-base-4B", "klein 4B"),
        ("sd_1.5", "SD 1.5"),
        ("sdxl_1.0", "SDXL"),
        ("qwen_image_edit", "Qwen-Image"),
        ("zimage:turbo", "Z-Image"),
        ("lumina2", "Z-Image"),
        ("Lumina-Image-2.0", "Lumina 2"),
        ("Chroma1-HD", "Chroma"),
    ],
)
def test_names_of_other_trainers(name: str, model: str) -> None:
    assert other_model([name], *CONFIGS[model]) is None
    assert any(other_model([name], *one) for one in CONFIGS.values())


@pytest.mark.parametrize("name", ["", "my own model", "hunyuan-video", "stable-diffusion-3", "v1"])
def test_names_that_no_family_knows(name: str) -> None:
    assert not any(other_model([name], *one) for one in CONFIGS.values())


def test_one_name_of_this_model_is_enough() -> None:
    assert other_model(["flux-1-dev", "medium"], *CONFIGS["SD3 medium"]) is None
    assert other_model(["flux-1-dev", "?"], *CONFIGS["SD3 medium"]) == "FLUX.1"


def test_a_lora_of_chroma_is_not_flux1s() -> None:
    """The blocks of both have layers of the same names and sizes."""
    assert other_model(["chroma", "chroma/lora"], *CONFIGS["FLUX.1 dev"]) == "Chroma"
    assert other_model(["flux1", "flux-1-dev/lora"], *CONFIGS["Chroma"]) == "FLUX.1"


def test_lumina_is_named_first() -> None:
    """Its name is that of some Z-Image LoRAs too."""
    assert other_model(["lumina2"], *CONFIGS["FLUX.1 dev"]) == "Lumina Image 2.0"


def test_every_title_is_that_of_a_name() -> None:
    for family in FAMILIES:
        titles = {family.model_title(config) for one, config in CONFIGS.values() if one is family}
        assert titles <= {*family.stated.values()}


def saved(folder: str, output: Path) -> Path:
    """Save a LoRA of a Stable Diffusion 3, whose update is not zero."""
    backbone = StableDiffusion3(folder, lora=LoRA(2))
    with torch.no_grad():
        for weight in backbone.policy.parameters():
            if weight.requires_grad:
                weight.normal_()
    return backbone.save(output)


def test_a_lora_of_3_in_35(tiny_sd3_folder: str, tiny_sd35_folder: str, tmp_path: Path) -> None:
    """Its layers fit: it is used, with a warning in every command."""
    file = saved(tiny_sd3_folder, tmp_path / "own")
    assert read_lora(file).models == ("stable-diffusion-3-medium/lora",)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "is a LoRA of")
        StableDiffusion3(tiny_sd3_folder, start_lora=str(file))
    message = (
        r"is a LoRA of Stable Diffusion 3 medium by its metadata \(stable-diffusion-3-medium/lora\)"
        r", and this model is Stable Diffusion 3\.5 medium: its layers fit and are used"
    )
    with pytest.warns(UserWarning, match=message):
        started = StableDiffusion3(tiny_sd35_folder, start_lora=str(file))
    plain = StableDiffusion3(tiny_sd35_folder).policy.denoiser.state_dict()
    changed = [n for n, x in started.policy.denoiser.state_dict().items() if (x != plain[n]).any()]
    assert changed
    with pytest.warns(UserWarning, match=message):
        StableDiffusion3(tiny_sd35_folder, lora=LoRA(2), training_adapter=str(file))
    for to in ("kohya", "transformer"):
        output = tmp_path / ("out.safetensors" if to == "kohya" else "out")
        with pytest.warns(UserWarning, match=message):
            export(file, to, output, "--base", tiny_sd35_folder)


def test_without_metadata_nothing_is_said(
    tiny_sd3_folder: str, tiny_sd35_folder: str, tmp_path: Path
) -> None:
    file = saved(tiny_sd3_folder, tmp_path)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "is a LoRA of")
        StableDiffusion3(tiny_sd35_folder, start_lora=str(bare))


def test_a_lora_that_does_not_fit_is_named_by_its_metadata(
    tiny_sd3_folder: str, tmp_path: Path
) -> None:
    file = saved(tiny_sd3_folder, tmp_path)
    state = {
        key.replace("blocks.1.", "blocks.9."): x.contiguous() for key, x in load_file(file).items()
    }
    save_file(state, file, {"ss_base_model_version": "flux1"})
    with pytest.raises(
        InputError, match=r"LoRA of another model family \(flux1 by its metadata\):"
    ):
        StableDiffusion3(tiny_sd3_folder, start_lora=str(file))

"""Components from single files, in all names that are in use, against the folder they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.commands.export import export
from lit_prefopt.errors import InputError
from lit_prefopt.families import SD1
from lit_prefopt.weights.component_files import WeightsFile, load_from_file, original_state
from tests.helpers.tiny import tiny_vae

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str) -> Path:
    """A single file of Stable Diffusion 1.x."""
    path = tmp_path_factory.mktemp("files") / "whole.safetensors"
    export(tiny_folder, "single-file", str(path))
    return path


@pytest.fixture(scope="module")
def xl_file(tmp_path_factory: pytest.TempPathFactory, tiny_xl_folder: str) -> Path:
    """A single file of SDXL."""
    path = tmp_path_factory.mktemp("files") / "xl.safetensors"
    export(tiny_xl_folder, "single-file", str(path))
    return path


def changed(file: Path, folder: Path, change: Callable[[State], State]) -> str:
    """Write a changed copy of a file."""
    path = folder / "changed.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, path)
    return str(path)


def without(part: str) -> Callable[[State], State]:
    """Return a function that drops all keys with a part."""
    return lambda state: {key: x for key, x in state.items() if part not in key}


def assert_equal_states(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_text_encoder_without_its_prefix(file: Path, tiny_folder: str, tmp_path: Path) -> None:
    """As in the first files of anime models, and what was merged from them."""
    old = changed(
        file,
        tmp_path,
        lambda s: {k.replace("transformer.text_model.", "transformer."): s[k] for k in s},
    )
    assert not any("text_model" in key for key in load_file(old))
    assert_equal_states(StableDiffusion(old, config=tiny_folder), StableDiffusion(tiny_folder))


def test_sdxl_text_encoders_in_other_names(
    xl_file: Path, tiny_xl_folder: str, tmp_path: Path
) -> None:
    """The first without its prefix, the second in the names of transformers."""
    second = load_file(f"{tiny_xl_folder}/text_encoder_2/model.safetensors")

    def change(state: State) -> State:
        state = without("embedders.1.")(state)
        state = {
            k.replace("embedders.0.transformer.text_model.", "embedders.0.transformer."): x
            for k, x in state.items()
        }
        return state | {f"conditioner.embedders.1.transformer.{k}": x for k, x in second.items()}

    other = changed(xl_file, tmp_path, change)
    ours = StableDiffusionXL(other, config=tiny_xl_folder)
    assert_equal_states(ours, StableDiffusionXL(tiny_xl_folder))


@pytest.mark.parametrize(
    ("lost", "name"),
    [
        ("cond_stage_model.transformer.text_model.encoder.layers.0.", "text_encoder"),
        ("model.diffusion_model.middle_block.1.norm.weight", "unet"),
        ("first_stage_model.decoder.conv_out.bias", "vae"),
    ],
)
def test_lost_tensors_are_named(
    lost: str, name: str, file: Path, tiny_folder: str, tmp_path: Path
) -> None:
    cut = changed(file, tmp_path, without(lost))
    with pytest.raises(InputError) as stop:
        StableDiffusion(cut, config=tiny_folder)
    message = str(stop.value)
    assert message.startswith(f"The {name} of {cut} lacks ")
    assert lost in message
    assert len(message) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e36])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
        ("model.diffusion_model.out.2.weight", "unet"),
        ("first_stage_model.decoder.conv_out.bias", "vae"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    key: str, name: str, value: float, file: Path, tiny_folder: str, tmp_path: Path
) -> None:
    def change(state: State) -> State:
        state[key].view(-1)[0] = value
        return state

    broken = changed(file, tmp_path, change)
    with pytest.raises(InputError, match=f"The {name} of .* contains NaN, infinite or absurdly"):
        StableDiffusion(broken, config=tiny_folder)


@pytest.mark.parametrize("start", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_unet_alone(start: str, file: Path, tiny_folder: str, tmp_path: Path) -> None:
    whole = "model.diffusion_model."
    alone = changed(
        file,
        tmp_path,
        lambda s: {
            start + k.removeprefix(whole): x * 2 for k, x in s.items() if k.startswith(whole)
        },
    )
    backbone = StableDiffusion(tiny_folder, denoiser=alone, reference=alone)
    theirs = StableDiffusion(tiny_folder).policy.denoiser.state_dict()
    for net in (backbone.policy.denoiser, backbone.policy.frozen):
        assert all(torch.equal(x, 2 * theirs[key]) for key, x in net.state_dict().items())


@pytest.mark.parametrize("original", [True, False])
def test_a_vae_alone(original: bool, file: Path, tiny_folder: str, tmp_path: Path) -> None:
    """As vae-ft-mse-840000, in the layout of its release and of a folder's file."""
    alone = f"{tiny_folder}/vae/diffusion_pytorch_model.safetensors"
    start = "first_stage_model."
    if original:
        alone = changed(
            file,
            tmp_path,
            lambda s: {k.removeprefix(start): x for k, x in s.items() if k.startswith(start)},
        )
    backbone = StableDiffusion(str(file), config=tiny_folder, vae=alone)
    assert_equal_states(backbone.vae, StableDiffusion(tiny_folder).vae)


@pytest.mark.parametrize("layout", ["original", "diffusers", "early diffusers"])
def test_attention_layers_of_a_vae(layout: str, tmp_path: Path) -> None:
    """They are convolutions in the original layout, and had other names in diffusers once."""
    vae = tiny_vae(mid_block_add_attention=True)
    state = original_state(vae, SD1.vae) if layout == "original" else vae.state_dict()
    if layout == "early diffusers":
        early = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
        for new, old in (early | {".to_out.0.": ".proj_attn."}).items():
            state = {key.replace(new, old): x for key, x in state.items()}
        assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file({k: x.contiguous() for k, x in state.items()}, tmp_path / "vae.safetensors")
    file = WeightsFile(str(tmp_path / "vae.safetensors"))
    ours = load_from_file(
        lambda: AutoencoderKL.from_config(vae.config), file, SD1.vae, torch.float32, "its own"
    )
    assert_equal_states(ours, vae)


def test_a_component_in_the_wrong_place_is_described(
    file: Path, tiny_folder: str, tmp_path: Path
) -> None:
    start = "model.diffusion_model."
    alone = changed(file, tmp_path, lambda s: {k: x for k, x in s.items() if k.startswith(start)})
    with pytest.raises(InputError, match="has no vae and no text_encoder .* but model.diffusion"):
        StableDiffusion(alone, config=tiny_folder)
    with pytest.raises(
        InputError, match=r"has no vae under names .* model.diffusion_model \(\d+\)"
    ):
        StableDiffusion(tiny_folder, vae=alone)


def test_eight_bit_weights_with_scales_are_refused(
    file: Path, tiny_folder: str, tmp_path: Path
) -> None:
    scaled = changed(
        file, tmp_path, lambda s: s | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}
    )
    with pytest.raises(InputError, match="8-bit weights with scales"):
        StableDiffusion(scaled, config=tiny_folder)


def test_layers_that_the_architecture_lacks_are_said(
    file: Path, tiny_folder: str, tmp_path: Path
) -> None:
    more = changed(
        file, tmp_path, lambda s: s | {"model.diffusion_model.extra.weight": torch.ones(1)}
    )
    with pytest.warns(
        UserWarning, match=r"1 tensors of the unet of .*\(model.diffusion_model.extra.weight\)"
    ):
        StableDiffusion(more, config=tiny_folder)

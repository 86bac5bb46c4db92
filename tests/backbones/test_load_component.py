"""Components from folders and from the hub: whole and finite, or a sentence."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.errors import InputError
from lit_prefopt.weights.hub import check_reachable

FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def folder(tiny_folder: str, tmp_path: Path) -> Path:
    """A copy of a pipeline's folder."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def weights(folder: Path, name: str) -> Path:
    """Return the file of a component's weights."""
    return folder / name / f"{FILES[name]}.safetensors"


def test_a_folder_that_has_only_one_variant(folder: Path, tiny_folder: str) -> None:
    for name in FILES:
        file = weights(folder, name)
        file.rename(file.with_suffix(".fp16.safetensors"))
    ours, theirs = StableDiffusion(str(folder)), StableDiffusion(tiny_folder)
    a, b = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_variant_that_not_all_components_have(folder: Path) -> None:
    file = weights(folder, "unet")
    save_file({k: 2 * x for k, x in load_file(file).items()}, file.with_suffix(".ema.safetensors"))
    plain = StableDiffusion(str(folder)).policy.denoiser.conv_in.weight
    other = StableDiffusion(str(folder), variant="ema").policy.denoiser.conv_in.weight
    assert torch.equal(other, 2 * plain)


def test_several_variants_are_listed(folder: Path) -> None:
    file = weights(folder, "vae")
    shutil.copy(file, file.with_suffix(".ema.safetensors"))
    file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(InputError, match=r"vae has only the variants ema, fp16: name one"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_tensors(name: str, folder: Path) -> None:
    """The loaders fill such weights at random, with no more than a warning."""
    file = weights(folder, name)
    state = load_file(file)
    lost = min(key for key in state if key.endswith(".weight"))
    save_file({key: x for key, x in state.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"The {name} of .* lacks 1 of {len(state)} tensors"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_nan(name: str, folder: Path) -> None:
    file = weights(folder, name)
    state = load_file(file)
    state[min(key for key in state if key.endswith(".weight"))].view(-1)[-1] = torch.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"The {name} of .* contains NaN"):
        StableDiffusion(str(folder))


def test_weights_that_overflow_in_the_precision_of_a_run(folder: Path) -> None:
    file = weights(folder, "vae")
    state = load_file(file)
    state["decoder.conv_in.bias"][0] = 1e5
    save_file(state, file, {"format": "pt"})
    StableDiffusion(str(folder))
    with pytest.raises(InputError, match=r"The vae of .* \(decoder.conv_in.bias\)"):
        StableDiffusion(str(folder), dtype="float16")


def test_a_vae_that_is_replaced_is_said(
    folder: Path, tiny_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of a recipe may name a VAE, which the user's checkpoint does not need."""
    with caplog.at_level("INFO"):
        StableDiffusion(str(folder), vae=tiny_folder)
    assert f"{folder} contains a VAE, which is not used because" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        StableDiffusion(str(folder))
    assert "which is not used" not in caplog.text


def test_without_network_a_hub_name_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nothing listens on stands for a network that is down."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match="some/model is no local folder, and the network is the"):
        StableDiffusion("some/model")
    with pytest.raises(InputError, match="some/vae is no local folder, and the network is the"):
        StableDiffusion("some/vae", vae="some/vae")
    assert time.monotonic() - start < 12


def test_names_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids downloads"):
        StableDiffusion("some/model")
    with pytest.raises(InputError, match="missing does not exist: name a folder"):
        StableDiffusion(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="nor a possible name on the hub"):
        StableDiffusion("two words")


def test_a_model_in_the_cache_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--our--model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    with pytest.raises(InputError, match="not in the hub's cache"):
        check_reachable("our/model")
    (snapshot / "config.json").write_text("{}")
    check_reachable("our/model")

"""Networks laid out or compiled for speed are the same networks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file

from lit_prefopt.backbones import LoRA, StableDiffusion, trained
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import images


def moved(backbone: StableDiffusion, steps: int = 2) -> list[float]:
    """Train for a few steps and return the losses."""
    module = DiffusionDPO(backbone, AdamW(1e-4), beta=500.0)
    module.train()
    optimizer = module.optimizer.build(trained(module).values())
    losses = []
    for _ in range(steps):
        batch = images(2)._replace(
            images=torch.rand(2, 2, 3, 32, 32, generator=torch.manual_seed(1))
        )
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_channels_last_is_the_same_step_and_the_same_export(
    tiny_folder: str, lora: LoRA | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = StableDiffusion(tiny_folder, lora=copy.copy(lora))
    torch.manual_seed(0)
    laid = StableDiffusion(tiny_folder, lora=lora, channels_last=True)
    for net in (laid.policy.denoiser, laid.vae.encoder, *filter(None, [laid.policy.frozen])):
        assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    losses = moved(laid)
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses == pytest.approx(moved(plain), rel=1e-3)
    files = [
        load_file(next(b.save(tmp_path / n).parent.rglob("*.safetensors")))
        for n, b in (("plain", plain), ("laid", laid))
    ]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[0].items():
        torch.testing.assert_close(files[1][name], weight, atol=1e-4, rtol=1e-2)


def test_compiled_blocks_change_no_name_and_belong_to_both_networks(tiny_folder: str) -> None:
    plain = StableDiffusion(tiny_folder)
    compiled = StableDiffusion(tiny_folder, compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for net in compiled.policy.networks:
        blocks = [m for m in net.modules() if isinstance(m, BasicTransformerBlock)]
        assert blocks
        assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize(
    ("gpu", "missing"), [(False, "needs g\\+\\+, which"), (True, "needs gcc or clang or cc")]
)
def test_compilation_without_a_compiler_is_refused_at_the_start(
    gpu: bool, missing: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=missing):
        StableDiffusion(tiny_folder, compile=True)
    monkeypatch.setenv("CC" if gpu else "CXX", "its-own-compiler")
    with pytest.raises(InputError, match="needs its-own-compiler"):
        StableDiffusion(tiny_folder, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_compiled_blocks_take_the_same_steps(
    tiny_folder: str, lora: LoRA | None, tmp_path: Path
) -> None:
    """With activations computed twice, and an adapter that is turned on and off at each step."""
    torch.manual_seed(0)
    plain = StableDiffusion(tiny_folder, lora=copy.copy(lora))
    torch.manual_seed(0)
    compiled = StableDiffusion(tiny_folder, lora=lora, compile=True, gradient_checkpointing=True)
    losses = moved(compiled, 4)
    assert losses[0] == pytest.approx(0.693147, abs=1e-3)  # beta times a rounding
    assert losses == pytest.approx(moved(plain, 4), rel=1e-2)
    compiled.save(tmp_path)
    if lora is None:
        stock = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert stock.state_dict().keys() == plain.policy.denoiser.state_dict().keys()

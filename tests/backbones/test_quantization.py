"""Frozen weights in four and in eight bits below an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from bitsandbytes.nn import Params4bit
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_prefopt.backbones import LoRA, StableDiffusion, trained
from lit_prefopt.backbones.int8 import Int8Linear
from lit_prefopt.backbones.quantization import KINDS, Quantization, saved_bytes
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.estimate.memory import footprint, savings
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.quantized import arguments, predicted
from tests.helpers.runs import assert_same_end, folder_of
from tests.helpers.step_zero import moved

OWN = 16 * 4 + 4
"""Bytes that each layer in NF4 has besides: the table of quantiles, and the mean of its scales."""


@pytest.fixture(params=get_args(Quantization))
def kind(request: pytest.FixtureRequest) -> Quantization:
    """Each quantization."""
    return request.param  # type: ignore[no-any-return]


def quantized(folder: str, kind: Quantization | None, checkpointing: bool = False) -> DiffusionDPO:
    """Return Diffusion-DPO with a LoRA over quantized weights."""
    backbone = StableDiffusion(
        folder, lora=LoRA(4), quantization=kind, gradient_checkpointing=checkpointing
    )
    return DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0).train()


def in_few_bits(weight: nn.Parameter) -> bool:
    return isinstance(weight, Params4bit) or weight.dtype == torch.int8


def test_transformer_blocks_have_few_bits_and_the_adapter_32(
    tiny_folder: str, kind: Quantization
) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4), quantization=kind)
    weights = dict(backbone.policy.denoiser.named_parameters())
    kept = {name for name, w in weights.items() if in_few_bits(w)}
    assert all("transformer_blocks" in name for name in kept)
    # queries, keys, values, outputs and both layers of the feed-forward networks
    assert sum("to_k.base_layer.weight" in name for name in kept) == len(kept) / 5
    dtype = torch.uint8 if kind == "nf4" else torch.int8
    assert {weights[name].dtype for name in kept} == {dtype}
    assert {w.dtype for w in trained(backbone).values()} == {torch.float32}
    assert not kept & set(trained(backbone.policy.denoiser))


def test_the_prediction_stays_near(tiny_folder: str, kind: Quantization) -> None:
    exact = predicted(StableDiffusion(tiny_folder, lora=LoRA(4)))
    near = predicted(StableDiffusion(tiny_folder, lora=LoRA(4), quantization=kind))
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < {"nf4": 0.1, "int8": 0.01}[kind]


def test_layers_in_eight_bits_are_near_those_of_the_model(tiny_folder: str) -> None:
    exact = dict(StableDiffusion(tiny_folder).policy.denoiser.named_modules())
    net = StableDiffusion(tiny_folder, lora=LoRA(4), quantization="int8").policy.denoiser
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, Int8Linear)}
    assert layers
    for name, layer in layers.items():
        weight = exact[name.removesuffix(".base_layer")].weight
        near = layer.weight * layer.scale.unsqueeze(1)
        assert 0 < (near - weight).norm() / weight.norm() < 0.01, name


def gradients(module: DiffusionDPO) -> dict[str, Tensor]:
    pairs = module.form_pairs(image_pairs())
    module.losses(module.log_ratios(pairs), pairs).mean().backward()
    return {name: p.grad for name, p in trained(module).items() if p.grad is not None}


def test_checkpointing_changes_no_gradient(tiny_folder: str, kind: Quantization) -> None:
    plain, saving = (quantized(tiny_folder, kind, on) for on in (False, True))
    for name, weight in trained(plain).items():  # both adapters from the same start
        trained(saving)[name].data.copy_(weight)
    moved(plain.backbone), moved(saving.backbone)
    expected, found = gradients(plain), gradients(saving)
    assert found.keys() == expected.keys() == trained(plain).keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert all(gradient.isfinite().all() for gradient in expected.values())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


def test_a_run_learns_resumes_exactly_and_is_exported(
    recipe: list[str], tiny_folder: str, tmp_path: Path, kind: Quantization
) -> None:
    halves = [x if x != str(folder_of(recipe)) else str(tmp_path / "halves") for x in recipe]
    main(["fit", *recipe, *arguments(kind)])
    main(["fit", *halves, *arguments(kind), "--trainer.max_steps", "2"])
    main(["fit", *halves, *arguments(kind), "--ckpt_path", "last"])
    assert_same_end(folder_of(recipe), tmp_path / "halves")
    state = torch.load(tmp_path / "halves" / "checkpoints" / "last.ckpt", weights_only=True)
    learned = {name: w for name, w in state["state_dict"].items() if "lora_B" in name}
    assert learned
    assert all(weight.abs().max() > 0 for weight in learned.values())
    name = "pytorch_lora_weights.safetensors"
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder)
    stock.load_lora_weights(folder_of(recipe) / "weights", weight_name=name)
    written = load_file(folder_of(recipe) / "weights" / name)
    plain = StableDiffusion(tiny_folder, lora=LoRA(4)).save(tmp_path / "plain")
    assert {k: v.shape for k, v in written.items()} == {
        k: v.shape for k, v in load_file(plain).items()
    }


# Memory ------------------------------------------------------------------------------------------


def test_a_footprint_is_what_is_there(tiny_folder: str, kind: Quantization) -> None:
    """The bytes of the tensors in the denoiser's state, each storage counted once."""
    module = quantized(tiny_folder, kind)
    net, parts = module.backbone.policy.denoiser, footprint(module)
    storages = [
        value.untyped_storage()
        for name, value in net.state_dict().items()
        # of NF4: settings as text, made by `state_dict`, and a table that all layers share
        if "quant_state" not in name and "nested_quant_map" not in name
    ]
    means = 4 * sum(isinstance(weight, Params4bit) for weight in net.parameters())  # text as well
    there = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    assert parts.trained + parts.frozen == there + means


def test_a_saving_is_what_following_it_saves(tiny_folder: str, kind: Quantization) -> None:
    exact, module = quantized(tiny_folder, None), quantized(tiny_folder, kind)
    saved = footprint(exact).frozen - footprint(module).frozen
    layers = sum(in_few_bits(weight) for weight in module.backbone.policy.denoiser.parameters())
    expected = saved_bytes(exact.backbone.policy.denoiser, kind)
    assert expected == saved + (OWN * layers if kind == "nf4" else 0)
    how = f"--backbone.quantization {kind}"
    [advised] = [found for found in savings(exact) if found.how == how]
    assert advised.size == expected
    assert advised.what.endswith(KINDS[kind])
    assert not [found for found in savings(module) if "quantization" in found.how]


# Bad input ---------------------------------------------------------------------------------------


def test_few_bits_want_an_adapter(tiny_folder: str, kind: Quantization) -> None:
    with pytest.raises(InputError, match="--backbone.lora LoRA.*--backbone.quantization` null"):
        StableDiffusion(tiny_folder, quantization=kind)


def test_four_bits_want_a_library_and_eight_do_not(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[bitsandbytes\]"):
        StableDiffusion(tiny_folder, lora=LoRA(4), quantization="nf4")
    StableDiffusion(tiny_folder, lora=LoRA(4), quantization="int8")


def test_other_kinds_are_refused_by_the_command_line(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, why in (
        (["--backbone.quantization", "int4"], "int4"),
        (["--backbone.nf4", "true"], "nf4"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *recipe, "--backbone.lora.rank", "4", *wrong])
        assert stopped.value.code == 2
        assert why in capsys.readouterr().err

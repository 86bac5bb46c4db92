"""LoRA layers: switched off for the reference, and their inputs kept as they are under autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lit_prefopt.backbones import LoRA, trained
from lit_prefopt.backbones.policy import Policy
from tests.helpers.tiny import tiny_unet

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
PROMPT = torch.randn(2, 4, 32, generator=torch.manual_seed(1))


def made(dtype: torch.dtype = torch.float32, **options: float) -> tuple[UNet2DConditionModel, ...]:
    """Return a network with a LoRA that has learned something, and the network without it."""
    torch.manual_seed(2)
    plain = tiny_unet().to(dtype).eval()
    net = copy.deepcopy(plain)
    LoRA(4, **options).add_to(net)
    for parameter in trained(net).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return net, plain


def output(net: UNet2DConditionModel) -> Tensor:
    """Return a prediction in the network's precision."""
    inputs = LATENTS.to(net.dtype), torch.tensor(500), PROMPT.to(net.dtype)
    return net(*inputs).sample


def layers(net: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """Return the LoRA's layers."""
    return [layer for layer in net.modules() if isinstance(layer, BaseTunerLayer)]


def gradients(net: UNet2DConditionModel, *, autocast: bool = True) -> dict[str, Tensor]:
    """Return the LoRA's gradients and the output."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = output(net)
    predicted.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in trained(net).items() if p.grad is not None}
    assert found.keys() == trained(net).keys()
    return found | {"output": predicted.detach()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare to the last bit."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_off_is_the_network_without_the_adapter_as_by_diffusers() -> None:
    net, plain = made()
    policy = Policy(net, "adapter-off")
    with torch.no_grad():
        learned = output(net)
        with policy.as_reference():
            off = output(policy.net)
        net.disable_adapters()
        by_diffusers = output(net)
        net.enable_adapters()
        assert torch.equal(off, output(plain))
        assert torch.equal(off, by_diffusers)
        assert torch.equal(output(net), learned)
    assert not torch.equal(off, learned)


def test_layers_are_as_before_after_an_error_and_after_blocks_inside_blocks() -> None:
    net, _ = made()
    policy = Policy(net, "adapter-off")
    with pytest.raises(KeyError, match="inside"), policy.as_reference():
        raise KeyError("inside")
    assert not any(layer.disable_adapters for layer in layers(net))
    with policy.as_reference():
        with policy.as_reference():
            pass
        assert all(layer.disable_adapters for layer in layers(net))
    assert not any(layer.disable_adapters for layer in layers(net))
    assert all(p.requires_grad for name, p in net.named_parameters() if ".lora_" in name)


def test_a_network_that_is_replaced_is_switched_itself() -> None:
    """As by FSDP, which puts a copy without hooks in the network's place when a run ends."""
    net, plain = made()
    policy = Policy(net, "adapter-off")
    with policy.as_reference():
        pass
    policy.denoiser = copy.deepcopy(net)
    with torch.no_grad(), policy.as_reference():
        assert torch.equal(output(policy.net), output(plain))
    twin = copy.deepcopy(policy)
    with torch.no_grad(), twin.as_reference():
        assert torch.equal(output(twin.net), output(plain))
        assert not any(layer.disable_adapters for layer in layers(policy.denoiser))


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_recomputed_with_the_adapter_after_a_pass_of_the_reference(
    autocast: bool,
) -> None:
    net, _ = made()
    wanted = gradients(net, autocast=autocast)
    policy = Policy(net, "adapter-off")
    net.enable_gradient_checkpointing()
    net.train()
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = output(net)
        with torch.no_grad(), policy.as_reference():
            reference = output(net)
    predicted.float().square().mean().backward()
    found = {name: p.grad for name, p in trained(net).items() if p.grad is not None}
    assert_equal(found | {"output": predicted.detach()}, wanted)
    assert not torch.equal(reference, predicted)


@contextmanager
def peft_casts(net: UNet2DConditionModel) -> Iterator[None]:
    """Cast inputs as peft does by itself."""
    hooks = dict(net._forward_pre_hooks)
    before = [layer.cast_input_dtype_enabled for layer in layers(net)]
    net._forward_pre_hooks.clear()
    for layer in layers(net):
        layer.cast_input_dtype_enabled = True
    yield
    net._forward_pre_hooks.update(hooks)
    for layer, casts in zip(layers(net), before, strict=True):
        layer.cast_input_dtype_enabled = casts


def kept_bytes(net: UNet2DConditionModel) -> int:
    """Return the bytes that a forward keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        predicted = output(net)
    assert predicted.grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_without_casts_give_the_same_bits_and_keep_less(
    dtype: torch.dtype, checkpointing: bool
) -> None:
    net, _ = made(dtype)
    if checkpointing:
        net.enable_gradient_checkpointing()
        net.train()
    found = gradients(net)
    assert not any(layer.cast_input_dtype_enabled for layer in layers(net))
    with peft_casts(net):
        assert_equal(found, gradients(net))
    if not checkpointing:
        less = kept_bytes(net)
        with peft_casts(net):
            assert less < kept_bytes(net)


def test_inputs_are_cast_where_there_is_no_autocast_and_where_dropout_would_round() -> None:
    net, _ = made(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output(net)
    found = gradients(net, autocast=False)  # bfloat16 inputs of float32 weights
    with peft_casts(net):
        assert_equal(found, gradients(net, autocast=False))
    dropping, _ = made(torch.bfloat16, dropout=0.5)
    dropping.train()
    torch.manual_seed(3)
    found = gradients(dropping)
    with peft_casts(dropping):
        torch.manual_seed(3)
        assert_equal(found, gradients(dropping))


def test_the_copy_of_a_network_sets_casts_of_its_own_layers() -> None:
    net, _ = made(torch.bfloat16)
    twin = copy.deepcopy(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output(twin)
    assert not any(layer.cast_input_dtype_enabled for layer in layers(twin))
    assert all(layer.cast_input_dtype_enabled for layer in layers(net))


@pytest.mark.slow
def test_compiled_blocks_see_the_switch() -> None:
    net, plain = made()
    policy = Policy(net, "adapter-off")
    for module in net.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            with policy.as_reference():
                torch.testing.assert_close(output(net), output(plain), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(output(net), output(plain), rtol=1e-3, atol=1e-3)

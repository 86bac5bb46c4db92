"""A linear layer with frozen weights of eight bits."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lit_prefopt.backbones.int8 import Int8Linear, dequantize_rows, quantize_rows


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """Return a frozen layer with random weights."""
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias).to(dtype).requires_grad_(False)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def input_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    [gradient] = torch.autograd.grad(layer(x).float().square().mean(), x)
    return gradient


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def test_each_weight_is_off_by_half_a_step_at_most() -> None:
    weight = drawn(64, 512) * torch.logspace(-6, 6, 64).unsqueeze(1)
    values, scale = quantize_rows(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (values.abs().amax(1) == 127).all()
    off = (dequantize_rows(values, scale, torch.float32) - weight).abs()
    assert (off <= 0.5001 * scale.unsqueeze(1)).all()
    rows = off.square().sum(1).sqrt() / weight.norm(dim=1)
    assert 0.004 < rows.min() < rows.max() < 0.012


def test_by_hand() -> None:
    values, scale = quantize_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0]))
    assert dequantize_rows(values, scale, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 96), (2, 3, 4, 96)], ids=str)
def test_it_is_the_layer_with_the_dequantized_weights(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Outputs and input gradients in every bit, in training and in evaluation."""
    plain, x = linear(dtype), drawn(*shape, dtype=dtype)
    ours, rounded = Int8Linear(plain), copy.deepcopy(plain)
    rounded.weight.data = dequantize_rows(ours.weight, ours.scale, dtype)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), rounded(x))
        assert torch.equal(input_gradient(ours, x), input_gradient(rounded, x))
    assert 0 < error(ours(x).float(), plain(x).float()) < 0.012


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_those_of_bitsandbytes(bias: bool) -> None:
    """Except where float16, through which it rounds, turns a weight to its neighbour."""
    plain, x = linear(bias=bias), drawn(5, 96)
    ours, theirs = Int8Linear(plain), Linear8bitLt(96, 160, bias, has_fp16_weights=False)
    theirs.weight = Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    theirs.bias = plain.bias
    theirs = theirs.to("cpu").train()
    off = (ours.weight.int() - theirs.weight.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.03
    assert error(ours(x), theirs(x)) < 3e-3


def test_large_inputs_stay_finite() -> None:
    plain, x = linear(), 1e5 * drawn(5, 96)
    ours = Int8Linear(plain)
    for mode in (True, False):
        assert error(ours.train(mode)(x), plain(x)) < 0.012


def test_autocast_decides_the_precision() -> None:
    ours, x = Int8Linear(linear()), drawn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), ours(x.bfloat16()))
        gradient = input_gradient(ours, x)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, input_gradient(ours, x.bfloat16()).float())
    assert ours.bias.dtype == torch.float32


def test_nothing_but_the_quantized_weights_is_kept_for_the_backward() -> None:
    ours, x = Int8Linear(linear()), drawn(5, 96).requires_grad_(True)
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = ours(x)
    assert {*kept} == {ours.weight.data_ptr(), ours.scale.data_ptr()}
    out.sum().backward()
    assert x.grad is not None


def test_scales_stay_float32_wherever_it_goes() -> None:
    ours, x = Int8Linear(linear()), drawn(5, 96, dtype=torch.bfloat16)
    expected, scale = ours(x), ours.scale.clone()
    half = nn.Sequential(copy.deepcopy(ours)).to(torch.bfloat16)
    assert (half[0].weight.dtype, half[0].bias.dtype) == (torch.int8, torch.bfloat16)
    assert torch.equal(half[0].scale, scale)
    assert torch.equal(half(x), expected)
    empty = nn.Sequential(copy.deepcopy(ours)).to("meta").to_empty(device="cpu")
    empty.load_state_dict({f"0.{name}": value for name, value in ours.state_dict().items()})
    assert torch.equal(empty(x), expected)


def test_building_one_draws_no_random_number() -> None:
    plain, state = linear(), torch.get_rng_state()
    Int8Linear(plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    ours, x = nn.Sequential(Int8Linear(linear()), nn.SiLU()), drawn(5, 96)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(x), ours(x))
            assert torch.equal(input_gradient(compiled, x), input_gradient(ours, x))
    torch.compiler.reset()

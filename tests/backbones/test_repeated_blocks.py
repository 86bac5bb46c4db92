"""Transformer blocks of UNets and of flow transformers, and what works block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import (
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lit_prefopt.backbones import LoRA, trained
from lit_prefopt.backbones.int8 import Int8Linear
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.quantization import Quantization, quantize
from lit_prefopt.backbones.repeated_blocks import repeated_blocks
from lit_prefopt.errors import InputError
from lit_prefopt.strategies.fully_sharded import blocks
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_sd3 import SD35, tiny_sd3_transformer

FLUX = {
    **{"patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 2},
    **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
    **{"pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
}
THREE_KINDS = {**SD35, "num_layers": 3}
"""A block with a second attention, one without, and the last, which has no text any more."""


def called(net: SD3Transformer2DModel, seed: int = 0, rows: int = 2, side: int = 8) -> Tensor:
    """Return the network's output for random inputs."""
    random = torch.Generator().manual_seed(seed)
    config: Any = net.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    out: Tensor = net(
        hidden_states=draw(rows, 16, side, side),
        timestep=1000 * torch.rand(rows, generator=random),
        encoder_hidden_states=draw(rows, 20, config.joint_attention_dim),
        pooled_projections=draw(rows, config.pooled_projection_dim),
        return_dict=False,
    )[0]
    return out


def names(found: list[nn.Module]) -> list[str]:
    return [type(block).__name__ for block in found]


def test_blocks_are_those_of_the_model() -> None:
    unet = tiny_unet()
    assert names(repeated_blocks(unet)) == ["BasicTransformerBlock"] * 4
    net = tiny_sd3_transformer()
    assert repeated_blocks(net) == list(net.transformer_blocks)
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**FLUX)
        sana = SanaTransformer2DModel(num_layers=2)
        lumina = Lumina2Transformer2DModel(num_layers=2)
    single = "FluxSingleTransformerBlock"
    assert names(repeated_blocks(flux)) == ["FluxTransformerBlock", single, single]
    assert names(repeated_blocks(sana)) == ["SanaTransformerBlock"] * 2  # and not its patches
    assert set(names(repeated_blocks(lumina))) == {"Lumina2TransformerBlock"}


def test_an_adapter_hides_no_block() -> None:
    net = tiny_sd3_transformer()
    LoRA(4).add_to(net)
    assert repeated_blocks(net) == list(net.transformer_blocks)


def test_blocks_are_sharded_with_the_stages_of_a_unet_around_them() -> None:
    unet, net = tiny_unet(), tiny_sd3_transformer()
    stages = [*unet.down_blocks, *unet.up_blocks, unet.mid_block]
    assert blocks(unet) == [*repeated_blocks(unet), *stages]
    assert blocks(net) == list(net.transformer_blocks)


@pytest.mark.parametrize("few", ["nf4", "int8"])
@pytest.mark.parametrize("kind", [{}, SD35], ids=["3", "3.5"])
def test_few_bits_are_in_the_blocks_and_the_output_stays_near(
    kind: dict[str, Any], few: Quantization
) -> None:
    torch.manual_seed(0)
    exact = tiny_sd3_transformer(**kind).requires_grad_(False)
    near = tiny_sd3_transformer(**kind).requires_grad_(False)
    near.load_state_dict(exact.state_dict())
    quantize(near, few, torch.float32, LoRA(4))
    linear = [n for n, m in exact.named_modules() if type(m) is nn.Linear]
    coarse = [n for n, m in near.named_modules() if isinstance(m, Linear4bit | Int8Linear)]
    assert coarse == [name for name in linear if name.startswith("transformer_blocks.")]
    before, after = called(exact), called(near)
    assert 0 < (after - before).square().mean() < 0.01 * before.square().mean()
    LoRA(4).add_to(near)
    near.enable_gradient_checkpointing()
    torch.testing.assert_close(called(near.train()), after)  # the adapter is the identity
    called(near).square().mean().backward()
    gradients = {n: p.grad for n, p in trained(near).items()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().max() > 0 for n, g in gradients.items() if g is not None and "lora_B" in n)


def test_compiled_blocks_keep_their_names() -> None:
    plain, compiled = tiny_sd3_transformer(), tiny_sd3_transformer()
    apply_memory_format_and_compile([compiled], channels_last=False, compiled=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert all(b._compiled_call_impl is not None for b in compiled.transformer_blocks)


def test_a_network_without_blocks_is_refused() -> None:
    plain = tiny_unet(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    with pytest.raises(InputError, match="UNet2DConditionModel has no rep.*--backbone.compile"):
        apply_memory_format_and_compile([plain], channels_last=False, compiled=True)
    with pytest.raises(InputError, match="--backbone.quantization"):
        quantize(plain, "nf4", torch.float32, LoRA(4))


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """Forget what was compiled, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_compiled_blocks_of_every_kind_compute_the_same(
    lora: LoRA | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointed, at three sizes, with and without gradients, the adapter turned on and off.

    All graphs are captured, with their backward passes, and run without generated code, which takes
    most of the time of a compilation.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    _compare(lora, THREE_KINDS, (8, 8, 12, 16))
    assert counters["stats"]["unique_graphs"] > 2 * 8  # more than torch's own limit allows a block


@pytest.mark.slow
@pytest.mark.usefixtures("no_graphs")
def test_generated_code_of_compiled_blocks_computes_the_same() -> None:
    """Of one block with an adapter, as a run with `--backbone.compile true` has it."""
    _compare(LoRA(4), {**SD35, "num_layers": 1}, (8,))


def _compare(lora: LoRA | None, kind: dict[str, Any], sides: tuple[int, ...]) -> None:
    """Check a network whose blocks are compiled against the same one without."""
    torch.manual_seed(0)
    plain, compiled = (tiny_sd3_transformer(**kind).train() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.enable_gradient_checkpointing()
    if lora is not None:
        lora.add_to(plain)
        lora.add_to(compiled)
        compiled.load_state_dict(plain.state_dict())
    apply_memory_format_and_compile([compiled], channels_last=False, compiled=True)
    for side in sides:
        outs = [_passes(net, side, adapter=lora is not None) for net in (plain, compiled)]
        for ours, expected in zip(*outs, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] > 0


def _passes(net: SD3Transformer2DModel, side: int, *, adapter: bool) -> list[Tensor]:
    """Return the reference's and the policy's outputs, and the policy's gradients."""
    if adapter:
        net.disable_adapters()
    with torch.no_grad():
        reference = called(net, side, side=side)
    if adapter:
        net.enable_adapters()
    policy = called(net, side, side=side)
    gradients = torch.autograd.grad(policy.square().mean(), [*trained(net).values()])
    with torch.no_grad():
        sampled = called(net, side, rows=1, side=side)
    return [reference, policy.detach(), torch.cat([g.flatten() for g in gradients]), sampled]

"""FLOPs of a flow transformer by hand, and that attention is counted on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.functional import scaled_dot_product_attention

from lit_prefopt.estimate.step_cost import flop_counter
from tests.helpers.tiny_sd3 import SD35, tiny_sd3_transformer

TEXT = 20


def flops_by_hand(net: SD3Transformer2DModel, side: int, text: int) -> int:
    """Return the FLOPs of one row's forward: 2 for each weight of a layer at each of its tokens."""
    c: Any = net.config
    width, patch = net.inner_dim, c.patch_size**2 * c.in_channels
    image = (side // c.patch_size) ** 2
    both, square = image + text, width**2
    total = 2 * image * patch * width * 2  # into patches, and out of them
    total += 2 * text * c.joint_attention_dim * width
    total += 2 * ((256 + width) + (c.pooled_projection_dim + width)) * width  # time, pooled text
    total += 2 * 2 * square  # modulation of the last norm
    for number in range(c.num_layers):
        dual, last = number in c.dual_attention_layers, number == c.num_layers - 1
        modulation = (9 if dual else 6) + (2 if last else 6)
        attended, out = 3 * both, (image if last else both)
        feed_forward = 8 * (image if last else both)
        total += 2 * square * (modulation + attended + out + feed_forward)
        total += 4 * both**2 * width
        if dual:
            total += 2 * square * 4 * image + 4 * image**2 * width
    return total


@pytest.mark.parametrize("kind", [{}, SD35, {**SD35, "num_layers": 3}], ids=["3", "3.5", "deeper"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_costs_what_its_tokens_cost(kind: dict[str, Any], device: str) -> None:
    net = tiny_sd3_transformer(**kind).to(device)
    sizes = net.config
    with torch.no_grad(), flop_counter() as counter:
        net(
            hidden_states=torch.zeros(2, 16, 8, 8, device=device),
            timestep=torch.zeros(2, device=device),
            encoder_hidden_states=torch.zeros(2, TEXT, sizes.joint_attention_dim, device=device),
            pooled_projections=torch.zeros(2, sizes.pooled_projection_dim, device=device),
        )
    assert counter.get_total_flops() == 2 * flops_by_hand(net, 8, TEXT)


def test_attention_is_counted_forward_and_backward() -> None:
    """Two products forward, and five backward, which makes the scores again."""
    rows = torch.randn(2, 4, 64, 16, requires_grad=True)
    product = 2 * (2 * 4) * 64 * 64 * 16
    with flop_counter() as counter:
        out = scaled_dot_product_attention(rows, rows, rows)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 7 * product

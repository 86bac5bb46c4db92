"""Step 0 of a flow: policy and reference are equal; and a policy that has moved."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lit_prefopt.backbones import trained
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import Pairs
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.on_policy import OnPolicyModule


def moved(backbone: Backbone, by: float = 0.1) -> Backbone:
    """Return the backbone with a policy that differs from its reference."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained(backbone).values():
            weight += by * torch.randn(weight.shape, generator=random)
    return backbone


def check_step_zero(module: DiffusionDPO | OnPolicyModule, batch: Pairs, rows: Tensor) -> None:
    """Check margin 0 bit for bit, loss ln 2, finite gradients of the LoRA, a still reference."""
    ratios = module.log_ratios(batch)
    assert ratios.t.dtype == torch.float64
    assert (ratios.t > 0).all()
    assert (ratios.t <= 1).all()
    assert (ratios.values == 0).all()
    losses = module.losses(ratios, batch)
    torch.testing.assert_close(losses, rows)
    before = copy.deepcopy(module.backbone.state_dict())
    losses.mean().backward()
    weights = trained(module)
    assert weights
    assert all("lora" in name for name in weights)
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in weights.values()
    )
    assert any(weight.grad.abs().max() > 0 for weight in weights.values())
    torch.optim.SGD(weights.values(), 1e-3).step()
    after = module.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= {name.removeprefix("backbone.") for name in weights}

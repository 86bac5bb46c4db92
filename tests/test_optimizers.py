from __future__ import annotations

import pytest
import torch

from lit_prefopt.errors import InputError
from lit_prefopt.optimizers import Adafactor, AdamW


def test_warmup_rises_to_the_learning_rate() -> None:
    config = AdamW(0.4, schedule="constant_with_warmup", warmup_steps=4)
    optimizer = config.build([torch.nn.Parameter(torch.zeros(1))])
    schedule = config.build_schedule(optimizer, max_steps=-1)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_a_decaying_schedule_needs_an_end() -> None:
    config = AdamW(0.4, schedule="cosine")
    optimizer = config.build([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="--trainer.max_steps"):
        config.build_schedule(optimizer, max_steps=-1)


def test_adafactor_keeps_rows_and_columns_and_bounds_its_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = Adafactor(0.01, clip_threshold=0.5, weight_decay=0.0).build([weight])
    weight.grad = torch.randn(16, 8) * torch.logspace(-3, 3, 8)
    optimizer.step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.01 * 0.5, rel=1e-4)
    kept = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.dim()]
    assert sorted(tuple(v.shape) for v in kept) == [(8,), (16,)]

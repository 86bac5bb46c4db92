from __future__ import annotations

import pytest
import torch

from lit_prefopt.errors import InputError
from lit_prefopt.optimizers import AdamW


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

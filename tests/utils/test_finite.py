"""Losses and weights that are not finite, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_prefopt.utils.finite import LossCheck, first_not_finite, tensors_of


def failed(losses: list[list[float]], most: int = 1) -> int:
    """Return the failed step of a run with these losses of the batches of each step."""
    check = LossCheck()
    assert check.failed() is None
    for number, batches in enumerate(losses, 1):
        for loss in batches:
            check.add(torch.tensor(loss))
        check.end_step(number, most)
    step = check.failed()
    assert step is not None
    return int(step)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_with_such_a_batch_is_kept(bad: float) -> None:
    assert failed([[0.7, 0.7], [0.7, 0.7]]) == 0
    assert failed([[0.7, 0.7], [bad, 0.7], [0.7, 0.7], [bad, bad]]) == 2


def test_a_scaler_may_recover_from_some_in_a_row() -> None:
    assert failed([[math.inf], [math.nan], [0.7], [math.nan], [math.nan]], most=3) == 0
    assert failed([[0.7], [math.nan], [math.nan], [math.nan], [0.7]], most=3) == 4


def test_a_step_that_is_left_out_does_not_count() -> None:
    check = LossCheck()
    check.add(torch.tensor(math.nan))
    check.forget()
    check.end_step(1, 1)
    check.add(torch.tensor(0.7))
    check.end_step(2, 1)
    assert check.failed() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    state: dict[str, object] = {
        "weights": {"a": torch.full((2, 2), largest, dtype=dtype), "empty": torch.empty(0)},
        "moments": [{"step": 3, "codes": torch.ones(2, dtype=torch.uint8)}],
    }
    assert [name for name, _ in tensors_of(state)] == [
        "weights.a",
        "weights.empty",
        "moments.0.codes",
    ]
    assert first_not_finite(tensors_of(state)) is None
    for bad in (math.nan, -math.inf):
        spoilt: Tensor = torch.tensor([[0.0, bad], [0.0, 0.0]], dtype=dtype)
        assert first_not_finite([*tensors_of(state), ("b", spoilt), ("c", spoilt)]) == "b"

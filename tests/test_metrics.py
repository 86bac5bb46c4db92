from __future__ import annotations

import pytest
import torch

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.metrics import PreferenceMetric, RunningMeans, accuracy, batch_means


def pairs(count: int) -> Pairs:
    return Pairs(
        torch.zeros(count, 2, 4, 1, 1),
        Prompt({"hidden": torch.zeros(count, 1, 1)}),
        torch.arange(count),
        torch.ones(count),
        torch.ones(count),
    )


def test_a_tie_counts_one_half() -> None:
    assert accuracy(torch.tensor([-3.0, 0.0, 2.0])).tolist() == [0, 0.5, 1]


def test_summary_by_hand() -> None:
    ratios = LogRatios(
        torch.tensor([[0.3, 0.1], [0.0, 0.1]]),
        torch.tensor([0, 500]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    )
    means = {k: v.item() for k, v in batch_means(ratios, pairs(2), torch.tensor(7.0), 10.0).items()}
    assert means["margin"] == pytest.approx((2.0 - 1.0) / 2)
    assert means["accuracy"] == 0.5
    factor = torch.sigmoid(torch.tensor([-2.0, 1.0])).mean().item()
    assert means["gradient_factor"] == pytest.approx(factor)
    assert means["chosen_error"] == 2
    assert means["rejected_error"] == 3
    assert means["error"] == 2.5
    assert means["loss"] == 7
    assert "reference_error" not in means


def test_held_out_by_bin_of_the_timestep() -> None:
    held_out = PreferenceMetric()
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    t = torch.tensor([0, 249, 250, 999])
    held_out.update(LogRatios(values, t), pairs(4), 2.0, t.double() / 1000)
    means = {name: value.item() for name, value in held_out.compute().items()}
    assert means["accuracy"] == pytest.approx(2.5 / 4)
    assert means["accuracy_t0"] == 0.5
    assert means["accuracy_t1"] == 1
    assert means["accuracy_t3"] == 0.5
    assert means["margin"] == pytest.approx(0.5)
    assert means["chance_95"] == pytest.approx(0.5 + 0.98 / 2)  # four pairs
    assert "accuracy_t2" not in means
    assert "reference_error" not in means
    held_out.reset()
    assert held_out.compute() == {}


def test_window_covers_the_batches_since_the_last_logged_step() -> None:
    window = RunningMeans()
    for value in (1.0, 3.0, 5.0):
        window.add({"loss": torch.tensor(value)})
    assert window.close()["loss"] == 3
    window.add({"loss": torch.tensor(9.0)})
    assert window.close()["loss"] == 9

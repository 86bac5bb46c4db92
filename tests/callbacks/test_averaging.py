from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_prefopt.callbacks import PolicyAveraging
from lit_prefopt.errors import InputError


class Line(LightningModule):
    """One trained weight that falls by 1 at each step, one frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.trained.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.trained.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.trained], 1.0)


def fit(callback: PolicyAveraging, accumulate: int = 1) -> Line:
    model = Line()
    loader = torch.utils.data.DataLoader(torch.zeros(4 * accumulate), 1)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2 * accumulate,
        num_sanity_val_steps=0,
    ).fit(model, loader, torch.utils.data.DataLoader(torch.zeros(1), 1))
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_by_hand(accumulate: int) -> None:
    """Weights 0, -1, -2, -3, -4 at decay 1/2: averages -.5, -1.25, -2.125, -3.0625."""
    callback = PolicyAveraging(decay=0.5)
    model = fit(callback, accumulate)
    assert model.trained.item() == pytest.approx(-3.0625)
    assert model.validated == pytest.approx([-1.25, -3.0625])
    assert model.frozen.item() == 1
    assert list(callback.average) == ["trained"]


def test_before_the_start_the_average_is_the_weights() -> None:
    """Two steps are followed, then -2 is averaged with -3 and that with -4."""
    model = fit(PolicyAveraging(decay=0.5, start=2))
    assert model.validated == pytest.approx([-2.0, -3.25])


@pytest.mark.parametrize("name", ["decay", "start"])
def test_a_null_is_refused(name: str) -> None:
    """The parser accepts `null` of any type."""
    with pytest.raises(InputError, match=f"{name} is None; give a number from 0"):
        PolicyAveraging(**{name: None})

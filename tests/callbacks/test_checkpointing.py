"""Gradient checkpointing that a run chooses by the device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_prefopt.batches import LogRatios
from lit_prefopt.callbacks import Budget
from lit_prefopt.cli import main
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.utils import device
from lit_prefopt.utils.device import free_bytes, memory_bytes

FREE = "lit_prefopt.callbacks.checkpointing.free_bytes"


class Noted(Callback):
    """Notes whether activations are recomputed, and the losses."""

    seen: list[bool]
    losses: list[float]
    evaluations: int

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        policy: Any = pl_module.backbone.policy  # type: ignore[union-attr]
        Noted.seen.append(policy.denoiser.is_gradient_checkpointing)
        Noted.losses.append(outputs["loss"].item())
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        [Noted.evaluations] = [one.spent for one in callbacks if isinstance(one, Budget)]


@pytest.fixture
def arguments(recipe: list[str]) -> list[str]:
    """A run of three steps that chooses, and notes what it chose."""
    Noted.seen, Noted.losses = [], []
    callback = "tests.callbacks.test_checkpointing.Noted"
    more = ["--trainer.callbacks+", "Budget", "--trainer.callbacks+", callback]
    more += ["--trainer.max_steps", "3"]
    more += ["--backbone.lora.rank", "4", "--backbone.lora.dropout", "0.3"]  # global randomness
    more += ["--model.optimizer.lr", "1e-2"]
    return [*recipe, "--backbone.gradient_checkpointing", "auto", *more]


def test_it_is_off_where_a_step_fits_and_on_where_it_does_not(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_prefopt.callbacks.checkpointing.rank_zero_info", said.append)
    main(["fit", *arguments])
    losses = Noted.losses
    assert Noted.seen == [False] * 3
    assert said[0].startswith("Gradient checkpointing is off: a step needs 0.0")
    assert len(said) == 1
    Noted.seen, Noted.losses = [], []
    monkeypatch.setattr(FREE, lambda _: GIB // 1000)
    main(["fit", *arguments, "--trainer.default_root_dir", str(tmp_path / "small")])
    assert (Noted.seen, Noted.losses) == ([True] * 3, losses)  # to the last bit
    assert said[1].startswith("Gradient checkpointing is on: a step without it would need 0.0")


def test_a_resumed_run_may_choose_otherwise(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", *arguments, "--trainer.max_steps", "2"])
    monkeypatch.setattr(FREE, lambda _: 0)
    main(["fit", *arguments, "--trainer.max_steps", "4", "--ckpt_path", "last"])
    assert Noted.seen == [False] * 2 + [True] * 2


def test_what_is_stated_is_kept_and_choosing_neither_draws_nor_counts(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", *arguments])
    losses, evaluations = Noted.losses, Noted.evaluations
    assert len(set(losses)) > 1
    Noted.seen, Noted.losses = [], []
    monkeypatch.setattr(FREE, lambda _: 1)
    stated = ["--backbone.gradient_checkpointing", "false"]
    main(["fit", *arguments, *stated, "--trainer.default_root_dir", str(tmp_path / "stated")])
    assert Noted.seen == [False] * 3
    assert (Noted.losses, Noted.evaluations) == (losses, evaluations)


class Reading(DiffusionDPO):
    """A method whose step reads a number from the device."""

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        losses = super().losses(ratios, pairs)
        return losses if losses.mean().item() < 1e9 else 0 * losses


def test_a_method_that_shapes_alone_cannot_run_keeps_it_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_prefopt.callbacks.checkpointing.rank_zero_info", said.append)
    main(["fit", *arguments, "--model", "tests.callbacks.test_checkpointing.Reading"])
    assert Noted.seen == [True] * 3
    assert said[0].startswith("Gradient checkpointing is on, since what a step needs cannot be")


def test_free_memory_is_less_than_all_and_within_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "CONTAINERS", ())
    assert 0 < free_bytes(cpu) < memory_bytes(cpu)
    limit, use = tmp_path / "max", tmp_path / "stat"
    monkeypatch.setattr(device, "CONTAINERS", [(str(limit), str(use), "anon")])
    use.write_text("anon 1000\nfile 500\nactive_anon 7\n")
    limit.write_text("3000\n")
    assert free_bytes(cpu) == 2000
    limit.write_text("max\n")
    assert free_bytes(cpu) > 2000

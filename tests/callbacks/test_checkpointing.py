"""Gradient checkpointing that a run chooses by the device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.cli import main
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.utils import device
from lit_prefopt.utils.device import free_bytes, memory_bytes

FREE = "lit_prefopt.callbacks.checkpointing.free_bytes"


class Noted(Callback):
    """Notes whether activations are recomputed, and the losses."""

    seen: list[bool]
    losses: list[float]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        policy: Any = pl_module.backbone.policy  # type: ignore[union-attr]
        Noted.seen.append(policy.denoiser.is_gradient_checkpointing)
        Noted.losses.append(outputs["loss"].item())


@pytest.fixture
def arguments(recipe: list[str]) -> list[str]:
    """A run of three steps that chooses, and notes what it chose."""
    Noted.seen, Noted.losses = [], []
    callback = "tests.callbacks.test_checkpointing.Noted"
    more = ["--trainer.callbacks+", callback, "--trainer.max_steps", "3"]
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


def test_what_is_stated_is_kept(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FREE, lambda _: 1)
    main(["fit", *arguments, "--backbone.gradient_checkpointing", "false"])
    assert Noted.seen == [False] * 3


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

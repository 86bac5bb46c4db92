"""ZeRO on CPUs, which Lightning refuses, and what recipes of tests name to watch its runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

from lit_prefopt.backbones import trained
from lit_prefopt.strategies import FullStateStrategy, ZeRO

os.environ["DS_ACCELERATOR"] = "cpu"


class CPUZeRO(ZeRO):
    """ZeRO over gloo."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Seen(Callback):
    """Writes the keys and the loss of every batch, and the weights at the end: `seen-RANK.pt`.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []
        self.keys: list[tuple[str, ...]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Note the batch, and its loss over all ranks."""
        self.losses.append(trainer.strategy.reduce(pl_module.measured["loss"]).item())
        self.keys.append(tuple(getattr(batch, "keys", ())))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        state = trainer.strategy.lightning_module_state_dict()
        weights = {name: state[name] for name in trained(pl_module) if name in state}
        seen = {"losses": self.losses, "keys": self.keys, "weights": weights}
        frozen = pl_module.backbone.policy.frozen
        seen["frozen"] = sum(map(held, [] if frozen is None else frozen.parameters()))
        if isinstance(trainer.strategy, FullStateStrategy):
            seen["moments"] = sum(held(state["exp_avg"]) for state in trainer.strategy.states())
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(seen, self.folder / f"seen-{trainer.global_rank}.pt")


def held(tensor: torch.Tensor) -> int:
    """Return how many elements of a tensor are this rank's to keep."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().numel()
    return getattr(tensor, "ds_tensor", tensor).numel()


class WholeGradients(Callback):
    """Writes the gradients of every step: `gradients-RANK.pt`.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.steps: list[torch.Tensor] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note them."""
        parts = [p.grad.flatten() for p in trained(pl_module).values() if p.grad is not None]
        self.steps.append(torch.cat(parts).clone())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.steps, self.folder / f"gradients-{trainer.global_rank}.pt")

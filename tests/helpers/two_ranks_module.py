"""Run by torchrun on two processes: trains, and lets every rank write down what it saw.

torchrun --nproc-per-node 2 -m tests.helpers.two_ranks_module FOLDER PIPELINE SHARDS RANK_OF_LORA
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.datamodules import PairShards
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW


class Witness(Callback):
    """Keeps the keys of every batch, and the gradients of every step."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.keys += batch.keys

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append(torch.cat([p.grad.flatten() for p in trained]))


def main(folder: str, pipeline: str, shards: str, rank: int) -> None:
    torch.set_num_threads(1)
    seed_everything(0)
    backbone = StableDiffusion(pipeline, lora=LoRA(rank) if rank else None)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=100.0)
    witness = Witness()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        callbacks=[witness],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = PairShards(shards, batch_size=3, resolution=32, workers=0, validation=shards)
    trainer.fit(module, data)
    weights = torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])
    seen = {"keys": witness.keys, "gradients": witness.gradients, "weights": weights.detach()}
    seen |= {name: trainer.callback_metrics[f"val/{name}"] for name in ("accuracy", "chance_95")}
    torch.save(seen, Path(folder) / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))

"""Run by torchrun on two processes: trains Diffusion-KTO, and every rank writes its baselines.

torchrun --nproc-per-node 2 -m tests.helpers.two_ranks_kto FOLDER PIPELINE SHARDS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.batches import LogRatios
from lit_prefopt.datamodules import PairShards
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods import DiffusionKTO
from lit_prefopt.optimizers import AdamW


class Noted(DiffusionKTO):
    """The method, which keeps the mean log-ratio of each batch and the baseline."""

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the loss, and note what it was computed from."""
        value = super().losses(ratios, pairs)
        self.means.append(ratios.values.mean().item())
        self.baselines.append(self.baseline.item())
        return value


def main(folder: str, pipeline: str, shards: str) -> None:
    torch.set_num_threads(1)
    seed_everything(0)
    module = Noted(StableDiffusion(pipeline), AdamW(1e-3), beta=100.0, dislike_weight=0.1)
    module.means, module.baselines = [], []
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, PairShards(shards, batch_size=3, resolution=32, workers=0))
    seen = {"means": module.means, "baselines": module.baselines}
    torch.save(seen, Path(folder) / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by torchrun on two processes: each trains a step-aware judge on one pair of a batch of two.

torchrun --nproc-per-node 2 -m tests.helpers.two_ranks_judge FOLDER PIPELINE CLIP
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.judges import StepAwarePreference
from tests.helpers.step_aware import SGD, batch, cut


def main(folder: str, pipeline: str, clip: str) -> None:
    torch.set_num_threads(1)
    backbone = StableDiffusion(pipeline, reference="none")
    times = (0, 500)
    module = StepAwarePreference(
        backbone,
        SGD(0.1),
        pretrained=clip,
        processor=None,
        guidance=3.0,
        validation_timesteps=times,
    )
    module.clip.load_state_dict(torch.load(Path(folder) / "start.pt", weights_only=True))
    rank = int(os.environ["RANK"])
    pairs, mine = batch(2, weights=torch.tensor([1.0, 0.05])), slice(rank, rank + 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training, held_out = (DataLoader([cut(x, mine)], batch_size=None) for x in (pairs, batch(2)))
    trainer.fit(module, training, held_out)
    seen = {"clip": module.clip.state_dict(), "logged": dict(trainer.callback_metrics)}
    torch.save(seen, Path(folder) / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

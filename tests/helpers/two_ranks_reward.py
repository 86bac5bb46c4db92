"""What a test's two ranks write down of a method with a reward."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.backbones import trained
from tests.helpers.collecting import rank


class Shared(Callback):
    """Writes scores and advantages of the last collection, and the weights: `shared-RANK.pt`.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"shared-{rank()}.pt"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        rounds = trainer.datamodule.collected.rounds  # type: ignore[attr-defined]
        seen = {
            "scores": torch.cat([one.scores for one in rounds]),
            "advantages": torch.cat([one.advantages for one in rounds]),
            "weights": {name: p.detach() for name, p in trained(pl_module).items()},
        }
        torch.save(seen, self.path)

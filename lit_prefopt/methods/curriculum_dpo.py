"""Curriculum DPO: easy pairs first, then harder ones as well (arXiv 2405.13637, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.data import CurriculumPairs
from lit_prefopt.errors import InputError
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class CurriculumDPO(DiffusionDPO):
    """Diffusion-DPO on pairs that come in stages, which the data module opens one by one.

    The loss is Diffusion-DPO's; what is new is which pairs there are (`CurriculumPairs`).
    """

    def on_fit_start(self) -> None:
        """Refuse pairs that come without stages."""
        super().on_fit_start()
        if not isinstance(self.trainer.datamodule, CurriculumPairs):  # type: ignore[attr-defined]
            raise InputError(
                "CurriculumDPO learns from pairs in stages: give `--data CurriculumPairs "
                "--data.stages FOLDER`, or take DiffusionDPO."
            )

    def measure(self, ratios: LogRatios, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
        """Return what is logged of a training batch, and the stage that it came in."""
        stage = self.trainer.datamodule.stage  # type: ignore[attr-defined]
        return super().measure(ratios, pairs, loss) | {
            "stage": torch.full_like(loss.detach(), stage, dtype=torch.float32)
        }

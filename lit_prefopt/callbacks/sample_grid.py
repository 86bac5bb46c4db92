"""Sample grids during training: policy and reference with the same prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.data.images import to_pil
from lit_prefopt.diffusion.sampling import check_sampling, sample
from lit_prefopt.errors import check_number
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.atomic_files import atomic_file


class SampleGrid(Callback):
    """Samples a grid of images at every validation, the reference's row above the policy's.

    It is logged (TensorBoard or Weights & Biases) and saved in `samples/` of the run's directory.

    Args:
        prompts: One column each; the first held-out prompts by default.
        count: Number of held-out prompts.
        sampling: Sampler settings; the backbone's own by default.
        seed: Seed of the first column, incremented for each further one.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        count: int = 4,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        check_number("count", count, 1)
        self.prompts = prompts
        self.count = count
        self.sampling = sampling
        self.seed = seed
        self._held_out: list[str] = []
        self._reference: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the sampler's settings; log if no grids can be sampled."""
        if _is_blind(pl_module):
            rank_zero_info(
                "Sample grids are disabled, because they need the VAE and the text encoders: "
                "load them with `--backbone.encoders true`."
            )
        elif isinstance(pl_module, PreferenceDiffusionModule) and stage == "fit":
            check_sampling(pl_module.backbone, self.sampling)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Keep the first held-out prompts."""
        if isinstance(batch, ImagePairs | LatentPairs) and len(self._held_out) < self.count:
            new = [text for text in dict.fromkeys(batch.texts) if text not in self._held_out]
            self._held_out = [*self._held_out, *new][: self.count]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the grid; save and log it (rank zero)."""
        if trainer.state.fn != "fit":
            return
        # all ranks sample rank zero's grid: with sharded weights, each has only its own shards
        prompts = trainer.strategy.broadcast(self.prompts or self._held_out)
        if not prompts or not isinstance(pl_module, PreferenceDiffusionModule):
            return
        if _is_blind(pl_module):
            return
        with trainer.precision_plugin.forward_context():
            grid = self._grid(pl_module, prompts)
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "samples" / f"{trainer.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            grid.save(stream, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(grid)
                logger.experiment.add_image(
                    "samples", pixels, trainer.global_step, dataformats="HWC"
                )
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [grid], trainer.global_step)

    def _grid(self, module: PreferenceDiffusionModule, prompts: list[str]) -> Image.Image:
        seeds = torch.arange(len(prompts)) + self.seed
        backbone = module.backbone
        how = self.sampling or backbone.sampling
        if self._reference is None and backbone.has_reference:
            with backbone.as_reference():
                self._reference = sample(backbone, prompts, seeds, how).cpu()
        rows = [sample(backbone, prompts, seeds, how).cpu()]
        if self._reference is not None:
            rows.insert(0, self._reference)
        return to_pil(torch.cat([torch.cat([*row], dim=-1) for row in rows], dim=-2))


def _is_blind(module: LightningModule) -> bool:
    """Return whether a method's backbone cannot sample images."""
    return isinstance(module, PreferenceDiffusionModule) and not module.backbone.has_encoders

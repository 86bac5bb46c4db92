"""Base class of all trainings: optimizer, logging, and checkpoints of the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_prefopt.backbones import Backbone, check_backbone, trained
from lit_prefopt.effective_batch import planned_steps, warn_of_short_epochs
from lit_prefopt.errors import InputError
from lit_prefopt.metrics import RunningMeans
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.optimizers.gradient_release import check_release
from lit_prefopt.strategies import FullySharded
from lit_prefopt.strategies.compatibility import check_strategy
from lit_prefopt.strategies.precision import apply_precision
from lit_prefopt.utils.quiet import ignore_warnings


class Learner(LightningModule):
    """LightningModule that trains, and saves in checkpoints, only parameters with gradients.

    A subclass's `training_step` returns `scale_last_step(loss, self._trainer)`.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
    """

    part: str = "backbone"
    """Name of the trained model, for messages."""

    layout: str = "diffusers' layout"
    """Layout of the files that `save` writes, for messages."""

    def __init__(self, backbone: Backbone, optimizer: OptimizerConfig) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.optimizer = optimizer
        self.window = RunningMeans()
        self.measured: dict[str, Tensor] = {}  # the last batch's means
        self.logged_step = 0
        self.strict_loading = False  # frozen parts come from elsewhere, not from checkpoints
        ignore_warnings()

    def save(self, folder: Path) -> Path:
        """Write the trained weights in their release layout, and return the path."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Check the precision; shard the denoiser and its frozen copy over devices under FSDP."""
        apply_precision(self)
        strategy = self.trainer.strategy
        check_strategy(type(strategy).__name__)
        if isinstance(strategy, FullySharded):
            for name in ("denoiser", "frozen"):
                strategy.shard(self.backbone.policy, name)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch to the device, except its seeds: random numbers are drawn on the CPU."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(seeds=batch.seeds)

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the means since the last logged step, every `log_every_n_steps` optimizer steps."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step == self.logged_step or not every or self.global_step % every:
            return
        self.logged_step = self.global_step
        for name, mean in self.window.close().items():
            # not `prog_bar`: Lightning would read it from the device after every batch from then on
            self.log(f"train/{name}", mean, sync_dist=True, batch_size=1)

    def on_fit_start(self) -> None:
        """Put trained modules in train mode; reject dtypes that the optimizer cannot update."""
        self.train()  # networks are loaded in evaluation mode, and Lightning keeps modes
        if self.optimizer.releases:
            check_release(self.trainer)
        learned = {torch.float32} | (
            {torch.bfloat16} if self.optimizer.supports_bf16_weights else set()
        )
        unsupported = {p.dtype for p in trained(self).values()} - learned
        if unsupported:
            raise InputError(
                f"The trained weights are {unsupported.pop()}, where updates at usual learning "
                "rates are lost to rounding: keep them in float32 (`--trainer.precision "
                "bf16-mixed` or `32-true`, `--backbone.policy_dtype float32`), or train bfloat16 "
                "with `--model.optimizer AdamW8bit --model.optimizer.stochastic_rounding true`."
            )

    def on_train_start(self) -> None:
        """Warn of epochs that are shorter than the effective batch."""
        warn_of_short_epochs(self.trainer)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trained parameters, and its learning-rate schedule."""
        optimizer = self.optimizer.build(trained(self).values())
        schedule = self.optimizer.build_schedule(optimizer, planned_steps(self.trainer))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the trained weights; sharded weights are gathered on rank zero."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in trained(self) if name in state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint holds exactly the weights that are trained here."""
        differing = set(trained(self)) ^ set(checkpoint["state_dict"])
        if differing:
            raise InputError(
                f"The checkpoint belongs to another {self.part}: {len(differing)} of its trained "
                f"weights differ, such as {min(differing)}; give `fit` the recipe that wrote it."
            )

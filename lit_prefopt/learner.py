"""What all trainings of a part have in common: frozen neighbours, checkpoints, the log."""

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
from lit_prefopt.utils.quiet import ignore_warnings


class Learner(LightningModule):
    """Trains what has gradients; all else is frozen and in no checkpoint.

    A subclass's `training_step` returns `scale_last_step(loss, self._trainer)`.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
    """

    part: str = "backbone"
    """What the trained weights belong to, for messages."""

    layout: str = "diffusers' layout"
    """In which `save` writes them, for messages."""

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
        """Write the trained weights for others to load, and return where they lie."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Divide the denoiser and its frozen copy among the devices, if the strategy wants that."""
        strategy = self.trainer.strategy
        check_strategy(type(strategy).__name__)
        if isinstance(strategy, FullySharded):
            for name in ("denoiser", "frozen"):
                strategy.shard(self.backbone.policy, name)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch but for its seeds: what is drawn from them is drawn on the host."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(seeds=batch.seeds)

    def on_train_batch_end(self, *_: Any) -> None:
        """Log what was seen since the last logged step, at each n-th optimizer step."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step == self.logged_step or not every or self.global_step % every:
            return
        self.logged_step = self.global_step
        for name, mean in self.window.close().items():
            # not `prog_bar`: Lightning would read it from the device after every batch from then on
            self.log(f"train/{name}", mean, sync_dist=True, batch_size=1)

    def on_fit_start(self) -> None:
        """Set what is trained to training, and refuse what the optimizer cannot step."""
        self.train()  # networks are loaded in evaluation mode, and Lightning keeps modes
        if self.optimizer.releases:
            check_release(self.trainer)
        learned = {torch.float32} | (
            {torch.bfloat16} if self.optimizer.supports_bf16_weights else set()
        )
        unsupported = {p.dtype for p in trained(self).values()} - learned
        if unsupported:
            raise InputError(
                f"The trained weights are {unsupported.pop()}, in which steps of usual learning "
                "rates are rounded away: keep them in float32 (`--trainer.precision bf16-mixed` or "
                "`32-true`, `--backbone.policy_dtype float32`), or learn bfloat16 by "
                "`--model.optimizer AdamW8bit --model.optimizer.stochastic_rounding true`."
            )

    def on_train_start(self) -> None:
        """Warn of epochs that never reach the effective batch."""
        warn_of_short_epochs(self.trainer)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what is trained."""
        optimizer = self.optimizer.build(trained(self).values())
        schedule = self.optimizer.build_schedule(optimizer, planned_steps(self.trainer))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights alone; of weights in shards rank zero has them all."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in trained(self) if name in state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold exactly what is trained here."""
        differing = set(trained(self)) ^ set(checkpoint["state_dict"])
        if differing:
            raise InputError(
                f"The checkpoint was made by another {self.part}: {len(differing)} of its trained "
                f"weights differ, such as {min(differing)}; give `fit` the recipe that made it."
            )

"""Base class of all trainings: optimizer, logging, and checkpoints of the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lit_prefopt.backbones import Backbone, check_backbone, trained
from lit_prefopt.effective_batch import planned_steps, warn_of_short_epochs
from lit_prefopt.errors import InputError
from lit_prefopt.fit_loop import note_validation, use_fit_loop
from lit_prefopt.metrics import RunningMeans
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.optimizers.gradient_release import check_release
from lit_prefopt.optimizers.resume import OPTIMIZER, apply_recipe, name_of
from lit_prefopt.strategies import FullySharded
from lit_prefopt.strategies.compatibility import check_strategy
from lit_prefopt.strategies.precision import apply_precision
from lit_prefopt.utils.finite import OVERFLOWS, LossCheck, first_not_finite, tensors_of
from lit_prefopt.utils.quiet import ignore_warnings
from lit_prefopt.weights.checkpoint import RESUME_PARTS, check_parts

CURES = (
    "usual remedies are a lower learning rate, a longer warm-up, gradient clipping "
    "(`--trainer.gradient_clip_val 1.0`), a larger beta, or bf16-mixed instead of 16-mixed"
)
CHECK_EVERY = 50  # optimizer steps between two checks of the loss, where nothing is logged


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
        self.loss_check = LossCheck()
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
        seeds = [name for name in ("seeds", "noise_seeds") if name in batch._fields]
        return moved._replace(**{name: getattr(batch, name) for name in seeds})

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Return the mean of a value without gradient over all ranks.

        Args:
            value: One number of each rank, (); all ranks call this together.
        """
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return value
        mean: Tensor = trainer.strategy.reduce(value.clone(), reduce_op="mean")
        return mean

    def on_before_backward(self, loss: Tensor) -> None:
        """Record whether the loss is finite, without reading it from the device."""
        self.loss_check.add(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Count the step if its loss is not finite; a gradient scaler may recover from some."""
        scaled = self.trainer.precision == "16-mixed"
        self.loss_check.end_step(self.global_step + 1, OVERFLOWS if scaled else 1)

    def check_loss(self) -> None:
        """Raise InputError if the loss is not finite any more; all ranks do so together.

        It reads one number from the device: at each logged step, which reads the metrics as well,
        before each checkpoint, and when training ends.

        Raises:
            InputError: A loss was not finite, or with 16-mixed those of 20 steps in a row.
        """
        failed = self.loss_check.failed()
        if failed is None:
            return
        if self.trainer.world_size > 1:
            failed = self.trainer.strategy.reduce(failed, reduce_op="max")
        if step := int(failed):
            raise InputError(
                f"Step {step}: the loss is not finite; {CURES}. The weights since then were not "
                "saved: resume from the checkpoint before with `--ckpt_path last`, or restart."
            )

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the means since the last logged step, every `log_every_n_steps` optimizer steps."""
        logging = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step == self.logged_step or self.global_step % (logging or CHECK_EVERY):
            return
        self.logged_step = self.global_step
        self.check_loss()
        for name, mean in (self.window.close() if logging else {}).items():
            # not `prog_bar`: Lightning would read it from the device after every batch from then on
            self.log(f"train/{name}", mean, sync_dist=True, batch_size=1)

    def on_fit_start(self) -> None:
        """Put trained modules in train mode; reject dtypes that the optimizer cannot update."""
        use_fit_loop(self.trainer)
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
        """Warn of epochs shorter than the effective batch; note the step of a resumed run."""
        warn_of_short_epochs(self.trainer)
        self.logged_step = self.global_step  # else its first batch alone would be logged

    def on_validation_epoch_end(self) -> None:
        """Record that the validation of this step is complete; subclasses log its means first."""
        if self.trainer.state.fn == "fit":
            note_validation(self.trainer)

    def on_train_end(self) -> None:
        """Check the losses of the last steps."""
        self.check_loss()

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trained parameters, and its learning-rate schedule."""
        optimizer = self.optimizer.build(trained(self).values())
        schedule = self.optimizer.build_schedule(optimizer, planned_steps(self.trainer))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the trained weights, and check that all numbers of a run are finite.

        So a checkpoint that cannot be resumed from never replaces one that can. Sharded weights
        are gathered on rank zero.

        Raises:
            InputError: The loss, a weight or a moment of the optimizer is not finite.
        """
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in trained(self) if name in state}
        checkpoint[OPTIMIZER] = name_of(self.optimizer)
        self.check_loss()
        trees = {key: checkpoint.get(key, ()) for key in ("state_dict", "optimizer_states")}
        if name := first_not_finite(tensors_of(trees)):
            raise InputError(
                f"The checkpoint of step {checkpoint['global_step']} was not written, because "
                f"{name} is not finite; {CURES}. Resume from the checkpoint before with "
                "`--ckpt_path last`, or restart."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint holds exactly the weights that are trained here.

        If a run is resumed, the optimizer's settings and schedule become those of the recipe.

        Raises:
            InputError: It belongs to another model, or lacks what a resumed run needs.
        """
        saved, own = checkpoint["state_dict"], trained(self)
        differing = set(own) ^ set(saved)
        # ZeRO stage 3 keeps no weights in its parameters, only their shapes
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in own.items()}
        differing |= {n for n in shapes if n in saved and tuple(saved[n].shape) != tuple(shapes[n])}
        if differing:
            raise InputError(
                f"The checkpoint belongs to another {self.part}: {len(differing)} of its trained "
                f"weights differ, such as {min(differing)}; give `fit` the recipe that wrote it."
            )
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_parts(checkpoint, "The checkpoint", RESUME_PARTS)
            if type(self).configure_optimizers is Learner.configure_optimizers:
                apply_recipe(checkpoint, self.optimizer, own.values(), planned_steps(self.trainer))

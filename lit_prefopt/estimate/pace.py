"""Measure the speed of a run in its first steps, then stop it."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.estimate.kept_encodings import kept_bytes
from lit_prefopt.estimate.memory import MemoryFootprint, footprint
from lit_prefopt.estimate.step_cost import checkpointing, step_cost
from lit_prefopt.learner import Learner
from lit_prefopt.runs.optimizer_steps import pending_batches
from lit_prefopt.utils.device import matmul_dtype, matmul_peak, peak_bytes, reset_peak, synchronize

FEW = 2  # batches per optimizer step, if the recipe accumulates more
TERA = 1e12


class BatchTiming(NamedTuple):
    """Timing of one batch."""

    waited: float  # seconds waiting for data
    worked: float  # seconds computing
    stepped: bool  # whether it ended in an optimizer step
    first: bool  # whether it is an epoch's first


class Recomputation(NamedTuple):
    """Saving and cost of gradient checkpointing in a batch."""

    memory: int  # bytes
    flops: int


class Pace(Callback):
    """Times a run's first optimizer steps and stops it.

    If a recipe accumulates many batches, a step has only a few of them here, which suffices to
    measure the time of a batch and the additional time of an optimizer step.

    Args:
        steps: Number of timed optimizer steps, after a warm-up step.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batches: list[BatchTiming] = []
        self.accumulated = 1  # batches of an optimizer step in the recipe
        self.rows = 0  # pairs of a batch on this rank
        self.flops = 0  # of a batch, recomputation excluded
        self.peak_bytes = 0
        self.matmul = 0.0  # TFLOP/s
        self.parts: MemoryFootprint | None = None
        self.checkpointed = False  # whether the denoiser's activations are recomputed
        self.recomputation = Recomputation(0, 0)
        self.keeps_encodings = False  # whether the recipe stores latents and prompts
        self.kept_bytes = 0  # of them, at most
        self._steps_before = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the memory peak."""
        self.device = trainer.strategy.root_device
        reset_peak(self.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce the number of accumulated batches."""
        self.accumulated = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = min(FEW, self.accumulated)
        self._steps_before = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start timing the wait for data."""
        self._fresh, self._since = True, time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing the step."""
        synchronize(self.device)
        now = time.perf_counter()
        self._waited, self._since = now - self._since, now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Record the step's time, and stop the run after enough of them."""
        synchronize(self.device)
        now = time.perf_counter()
        stepped = not pending_batches(trainer)
        self.batches.append(BatchTiming(self._waited, now - self._since, stepped, self._fresh))
        self._fresh, self._since = False, now
        if trainer.global_step - self._steps_before > self.steps:
            trainer.should_stop = True
        self._last = batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the device's matmul peak, and compute the step's FLOPs from shapes."""
        if not self.timed:
            return
        self.peak_bytes = peak_bytes(self.device)
        dtype = matmul_dtype(trainer.precision)
        self.matmul = matmul_peak(dtype, self.device)
        if isinstance(pl_module, Learner):
            self.rows = len(self._last.seeds)
            context = trainer.precision_plugin.forward_context
            costs = {}
            for on in (False, True):
                with checkpointing(pl_module, on):
                    costs[on] = step_cost(pl_module, self._last, context)
            self.flops = costs[False].flops
            self.recomputation = Recomputation(
                costs[False].activations - costs[True].activations,
                costs[True].flops - costs[False].flops,
            )
            self.checkpointed = pl_module.backbone.policy.denoiser.is_gradient_checkpointing
            self.parts = footprint(pl_module, costs[self.checkpointed].activations)
            if self.keeps_encodings:
                data = trainer.datamodule  # type: ignore[attr-defined]
                self.kept_bytes = kept_bytes(pl_module, self._last, trainer, data)

    # Results ------------------------------------------------------------------------------------

    @property
    def timed(self) -> list[BatchTiming]:
        """The batches after the first optimizer step."""
        warm = next(n for n, batch in enumerate(self.batches) if batch.stepped) + 1
        return self.batches[warm:]

    @property
    def batch_seconds(self) -> float:
        """Seconds of a batch without an optimizer step, or of any batch if all have one."""
        inner = [b for b in self.timed if not b.stepped] or self.timed
        return median(b.worked for b in inner)

    @property
    def wait_seconds(self) -> float:
        """Seconds of waiting for a batch, except the first one of an epoch."""
        return median([b.waited for b in self.timed if not b.first] or [0.0])

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step with all the batches that the recipe accumulates."""
        last = median(b.worked for b in self.timed if b.stepped)
        inner = (self.accumulated - 1) * self.batch_seconds
        return last + inner + self.accumulated * self.wait_seconds

    @property
    def epoch_seconds(self) -> float:
        """Seconds before the first batch of an epoch, such as for a roll-out."""
        return median(b.waited for b in self.batches if b.first)

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: share of the device's matmul peak, without recomputation."""
        seconds = self.step_seconds / self.accumulated
        return self.flops / TERA / seconds / self.matmul


def device_name(device: torch.device) -> str:
    """Return the device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

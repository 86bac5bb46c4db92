"""Detect diverging runs: NaNs, loss spikes, rising chosen error; warn, skip, rewind or stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_prefopt.backbones import trained
from lit_prefopt.callbacks.averaging import PolicyAveraging
from lit_prefopt.callbacks.spike_detection import SpikeDetector, StepStatistics
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.learner import CURES, Learner
from lit_prefopt.strategies import ZeRO

RISING_CURES = (
    "the policy gets worse on chosen images; usual remedies are a larger beta, a lower "
    "learning rate, `--model.anchor`, or `--model.chosen_protection 0.9`"
)


class Guard(Callback):
    """Detects non-finite losses and gradients, spikes of either, and a rising chosen error.

    A spike is a loss or a gradient norm far above the median of the last steps, measured in median
    absolute deviations, both of logarithms. It is detected before the optimizer step that it would
    affect, and all ranks decide alike. A rising chosen error is slow and only reported.
    Without Guard, and where it only warns, a run stops at the first loss that is not finite.

    A skipped step still counts: the learning-rate schedule and the data advance. After a rewind,
    weights, optimizer and average are those of the last checkpoint, while data and learning
    rate continue from the current step, so that the next pairs are different ones.

    Cost: one gradient norm per optimizer step. `warn` reads it from the device at every n-th
    step; the other modes synchronize at each step.

    Args:
        on_spike: `warn` logs a warning; `skip` also skips the step; `rewind` also restores the
            last checkpoint; `stop` ends the run.
        threshold: Deviations above the median that count as a spike.
        window: Number of previous optimizer steps for the statistics; spikes are detected only
            after that many.
        rise: Share by which the chosen error may exceed the reference's, or without a reference
            that of the first steps.
        most: Maximum number of skipped steps in a row and of rewinds in total before the run
            stops.
        every: With `warn`, optimizer steps between two checks.
    """

    def __init__(
        self,
        on_spike: Literal["warn", "skip", "rewind", "stop"] = "warn",
        threshold: float = 6.0,
        window: int = 100,
        rise: float = 0.1,
        most: int = 5,
        every: int = 10,
    ) -> None:
        check_number("threshold", threshold, above=0)
        check_number("window", window, 2)
        check_number("rise", rise, above=0)
        check_number("most", most, 0)
        check_number("every", every, 1)
        self.on_spike, self.window, self.rise, self.most = on_spike, window, rise, most
        self.every = every if on_spike == "warn" else 1
        self.watch = SpikeDetector(threshold, window)
        self.skipped = self.rewound = 0
        self.last_reported: dict[str, int] = {}
        self._batches: list[Tensor] = []
        self._unread: list[tuple[int, Tensor]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that gradients are available, and checkpoints if the guard is to rewind."""
        if isinstance(trainer.strategy, ZeRO):
            raise InputError(
                "Guard needs the gradients before the step, which ZeRO does not expose: remove the "
                "callback Guard, or use `--trainer hardware/fsdp.yaml`."
            )
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if self.on_spike == "rewind" and all(c.save_weights_only for c in savers):
            raise InputError(
                "Guard can rewind only to checkpoints with weights and optimizer: add the "
                "callback `Checkpoints`, or set `on_spike` to skip."
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a batch's values without reading them from the device."""
        if isinstance(pl_module, Learner) and pl_module.measured:
            measured = pl_module.measured
            unknown = torch.full_like(measured["loss"], -1.0)
            names = ("loss", "chosen_error", "chosen_reference_error")
            self._batches.append(torch.stack([measured.get(n, unknown).float() for n in names]))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the next step before its gradients are clipped."""
        gradients = [p.grad for p in trained(pl_module).values() if p.grad is not None]
        if not self._batches or not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
        numbers = torch.cat([torch.stack(self._batches).mean(0), norm[None]])
        self._batches = []
        number = trainer.global_step + 1
        self._unread.append((number, trainer.strategy.reduce(numbers, reduce_op="mean")))
        if number % self.every == 0:
            self._check_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last steps."""
        self._check_step(trainer, pl_module)

    def _check_step(self, trainer: Trainer, module: LightningModule) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for step in self._read():
            seen = self.watch.spike(step, scaled=scaled)
            if seen is None or self.on_spike == "warn":
                self.watch.add(step)
                self.skipped = 0
            if seen is not None:
                self._act(f"Step {step.number}: {seen}", step.number, trainer, module)
            share = self.watch.chosen.share()
            if share > self.rise and self._is_new("rise", step.number):
                risen = f"the chosen error is {share:.0%} above its initial value"
                rank_zero_warn(f"Step {step.number}: {risen}; {RISING_CURES}.")

    def _read(self) -> list[StepStatistics]:
        steps = [StepStatistics(number, *numbers.tolist()) for number, numbers in self._unread]
        self._unread = []
        return steps

    def _act(self, seen: str, step: int, trainer: Trainer, module: LightningModule) -> None:
        if self.on_spike == "warn":
            if self._is_new("spike", step):
                rank_zero_warn(f"{seen}; {CURES}.")
            return
        done = self.skipped if self.on_spike == "skip" else self.rewound
        if self.on_spike == "stop" or done >= self.most:
            raise InputError(f"{seen}; {CURES}. Then resume with `--ckpt_path last`, or restart.")
        if self.on_spike == "skip":
            self.skipped += 1
            rank_zero_warn(f"{seen}; this step is skipped.")
        else:
            self.rewound += 1
            where = rewind(trainer, module)
            rank_zero_warn(f"{seen}; the run is rewound to the weights of {where}.")
        if isinstance(module, Learner):
            module.loss_check.forget()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)  # optimizers skip weights without a gradient

    def _is_new(self, kind: str, step: int) -> bool:
        """Return whether this was not reported within the last window."""
        if step - self.last_reported.get(kind, -self.window) < self.window:
            return False
        self.last_reported[kind] = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, the counters and the unchecked steps."""
        counts = {
            "skipped": self.skipped,
            "rewound": self.rewound,
            "last_reported": dict(self.last_reported),
        }
        unread = [(number, numbers.cpu()) for number, numbers in self._unread]
        return {**self.watch.state_dict(), **counts, "unread": unread}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore statistics, counters and unchecked steps."""
        self.watch.load_state_dict(state_dict)
        self.skipped, self.rewound = state_dict["skipped"], state_dict["rewound"]
        self.last_reported = dict(state_dict["last_reported"])
        self._unread = [(number, numbers) for number, numbers in state_dict["unread"]]


@torch.no_grad()
def rewind(trainer: Trainer, module: LightningModule) -> Path:
    """Restore weights, optimizer and average from the last checkpoint, and return its path.

    Raises:
        InputError: There is none yet.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    written = [saver.last_model_path or saver.best_model_path for saver in savers]
    path = Path(next((name for name in written if name), str(trainer.ckpt_path or "")))
    if not path.is_file():
        raise InputError(
            "The run diverged before its first checkpoint, so Guard cannot rewind it: set "
            f"`on_spike` to stop; {CURES}."
        )
    checkpoint = torch.load(path, map_location=module.device, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=False)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PolicyAveraging):
            callback.on_load_checkpoint(trainer, module, checkpoint)
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        saved["param_groups"] = optimizer.state_dict()["param_groups"]  # the current learning rate
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    return path

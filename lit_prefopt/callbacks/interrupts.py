"""Handle Ctrl-C and SIGTERM: save a checkpoint after an optimizer step, and print how to resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.runs.checkpoint_files import LAST
from lit_prefopt.runs.directory import CHECKPOINTS
from lit_prefopt.runs.optimizer_steps import counters_at_last_step, pending_batches

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SAME = 0.2  # seconds within which two signals are one


class Interrupted(SystemExit):
    """Raised when a signal stopped the run and its state is saved; exit code 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Interrupts(Callback):
    """Saves a checkpoint and stops on Ctrl-C or SIGTERM; the second signal stops at once.

    Checkpoints do not contain accumulated gradients, so the run continues to the optimizer step;
    if that takes longer than `grace`, the state after the previous step is saved. All ranks stop
    at the same batch, whichever received the signal. Lightning handles SLURM's requeue (SIGUSR1).
    The command line adds it to every `fit`; elsewhere it must be the last callback.

    Args:
        grace: Maximum seconds to wait for the end of a gradient accumulation.
    """

    def __init__(self, grace: float = 20.0) -> None:
        self.grace = grace
        self._signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; Lightning's own SIGTERM handler saves nothing and exits with 0."""
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for signum in NAMES:
                self._before[signum] = signal.signal(signum, self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop after a batch that ended in an optimizer step, or after the grace period."""
        signum = _anywhere(trainer, self._signum)
        if signum:
            late = _anywhere(trainer, time.monotonic() - self._since > self.grace)
            if late or not pending_batches(trainer):
                self._stop(trainer, signum)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop within a validation too; several ranks wait for its end."""
        if self._signum and trainer.state.fn == "fit" and trainer.world_size == 1:
            self._stop(trainer, self._signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once from now on: the state is saved, and later outputs can be repeated."""
        for signum in self._before:
            signal.signal(signum, _stop_now)
        signum = _anywhere(trainer, self._signum)
        if signum:
            _stop_now(signum)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._leave()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker inherits this handler
            return
        if self._signum:
            # a cluster may send it to every process, and a launcher pass it on
            if time.monotonic() - self._since > SAME:
                os._exit(128 + signum)
            return
        self._signum, self._since = signum, time.monotonic()
        text = f"\n{NAMES[signal.Signals(signum)]}: saving the state after this optimizer step; "
        os.write(2, f"{text}a second signal stops at once.\n".encode())  # print may be interrupted

    def _leave(self) -> None:
        for signum, handler in self._before.items():
            # at the end of a fit Lightning has restored the original handlers
            if signal.getsignal(signum) in (self._note, _stop_now):
                signal.signal(signum, handler)
        self._before = {}

    def _stop(self, trainer: Trainer, signum: int) -> None:
        with counters_at_last_step(trainer):
            path = _save(trainer)
        rank_zero_info(
            f"Stopped by {NAMES[signal.Signals(signum)]} after step {trainer.global_step}: the "
            f"state is saved in {path}; resume with the same command and `--ckpt_path last`."
        )
        raise Interrupted(signum)


def _stop_now(signum: int, frame: FrameType | None = None) -> None:
    raise Interrupted(signum)


def _anywhere(trainer: Trainer, value: float) -> int:
    """Return the maximum of a value over the ranks."""
    if trainer.world_size == 1:
        return int(value)
    mine = torch.tensor(int(value), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(mine, reduce_op="max"))


def _save(trainer: Trainer) -> Path:
    """Write `last.ckpt` into the run's checkpoint folder, and return its path."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    folders = [str(c.dirpath) for c in savers if c.dirpath is not None]
    folder = folders[0] if folders else str(Path(trainer.default_root_dir) / CHECKPOINTS)
    path = Path(folder) / LAST
    for saver in savers[:1]:
        saver.last_model_path = str(path)  # it is part of the state
    trainer.save_checkpoint(path)
    return path

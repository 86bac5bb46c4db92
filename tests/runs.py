"""Runs of the command line in processes of their own, to be stopped by signals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).parent.parent
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWO_RANKS += ["-m", "lit_prefopt.cli"]
WEIGHTS = ("state_dict", "running_state", "optimizer_states", "lr_schedulers")


class Beat(Callback):
    """Writes the number of batches done, and what it was called in, into a file.

    Args:
        path: The file.
        pause: Seconds to wait after each batch, so that a signal can hit it.
    """

    def __init__(self, path: str, pause: float = 0.0) -> None:
        self.path, self.pause = Path(path), pause

    def _write(self, text: str) -> None:
        with self.path.open("a") as stream:
            stream.write(f"{text}\n")
        time.sleep(self.pause)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._write(f"batch {trainer.fit_loop.epoch_loop.batch_progress.total.processed}")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._write("validation")


def folder_of(arguments: list[str]) -> Path:
    """Return the run's directory that these arguments name."""
    return Path(arguments[arguments.index("--trainer.default_root_dir") + 1])


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start `lit-prefopt fit` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = options.pop("command", [sys.executable, "-m", "lit_prefopt.cli"])
    return subprocess.Popen(
        [*command, "fit", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def wait_for(path: Path, text: str, process: subprocess.Popen[str], patience: float = 90) -> None:
    """Wait until a line of a file is `text`."""
    end = time.monotonic() + patience
    while not (path.exists() and text in path.read_text().splitlines()):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{text!r} never came:\n{process.communicate()[0]}")
        time.sleep(0.005)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two runs ended in the same weights, average, optimizer and schedule."""
    a, b = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)
    )
    assert a["global_step"] == b["global_step"]
    for key in WEIGHTS:
        assert same(a[key], b[key]), key
    assert a["state_dict"]

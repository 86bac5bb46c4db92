"""Runs of the command line in processes of their own, to be stopped by signals."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.forked import OF_RUNS, ROOT, ForkedPopen

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWO_RANKS = [*TORCHRUN, "-m", "lit_prefopt.cli"]
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
    return launch(["fit", *arguments], **options)


def launch(
    arguments: list[str],
    command: Sequence[str] = (sys.executable, "-m", "lit_prefopt.cli"),
    popen: type[subprocess.Popen] = ForkedPopen,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a command of this program in a process of its own, or with TWO_RANKS in several.

    Args:
        arguments: Its arguments.
        command: The program.
        popen: `subprocess.Popen` for a new interpreter in place of a fork.
        **options: Further arguments of Popen.
    """
    environment = {**os.environ, **OF_RUNS}
    return popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def wait_until(
    reached: Callable[[], bool], process: subprocess.Popen[str], patience: float = 300
) -> None:
    """Wait for a moment of a run; where it never comes, the run is killed and fails."""
    end = time.monotonic() + patience
    while not reached():
        if process.poll() is not None or time.monotonic() > end:
            kill(process)
            raise AssertionError(f"the moment never came:\n{process.communicate()[0]}")
        time.sleep(0.005)


def lines(path: Path) -> list[str]:
    """Return the lines of a file, none where it is not there yet."""
    return path.read_text().splitlines() if path.exists() else []


def wait_for(path: Path, text: str, process: subprocess.Popen[str], patience: float = 300) -> None:
    """Wait until a line of a file is `text`."""
    wait_until(lambda: text in lines(path), process, patience)


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of the ranks, in their order."""
    ranks = {}
    for path in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{path}/environ").read_bytes().split(b"\0")
        own = re.fullmatch(r"rank (\d+)", Path(f"/proc/{path}/comm").read_text().strip())
        variables += [f"LOCAL_RANK={own[1]}".encode()] if own else []  # of a fork
        ranks |= {v: int(path) for v in variables if v.startswith(b"LOCAL_RANK=")}
    return [ranks[name] for name in sorted(ranks)]


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a run and to its ranks, which torchrun starts in sessions of their own."""
    ranks = ranks_of(process.pid) if process.poll() is None else []
    process.kill()
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finished(process: subprocess.Popen[str], patience: float = 600) -> str:
    """Return what a run said to its end; one that hangs is killed with its ranks and fails."""
    try:
        return process.communicate(timeout=patience)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        said = process.communicate()[0]
        raise AssertionError(f"not at its end after {patience} s:\n{said}") from None


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of all files that are written, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
        assert same(a.get(key), b.get(key)), key  # a run without an average has no running state
    assert a["state_dict"]


def scalars(run: Path) -> dict[str, list[float]]:
    """Everything that was logged, by name."""
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


LORA = ["--backbone.lora.rank", "4"]


class FailAt(Callback):
    """Fails in a batch, before its gradients are there."""

    batch = 4

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise KeyError("a failure")

"""A callback that notes the cost of every step of a fit."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback


class Clock(Callback):
    """Notes CPU and wall seconds of every step, and the peak memory of all but the first."""

    started: ClassVar[float] = 0.0  # CPU seconds of the process when the first step begins
    costs: ClassVar[list[dict[str, float]]] = []
    peak: ClassVar[int] = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Note when the first step begins."""
        if not Clock.costs and not Clock.started:
            Clock.started = time.process_time()

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self.since = (time.process_time(), time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        """Note a step, with its data and the collection before it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.process_time(), time.perf_counter())
        cpu, wall = (b - a for a, b in zip(self.since, now, strict=True))
        Clock.costs.append({"cpu": cpu, "wall": wall})
        if len(Clock.costs) == 1:
            _reset_peak()
        self.since = (time.process_time(), time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        """Read the peak."""
        Clock.peak = _peak_bytes()

    @staticmethod
    def result() -> dict[str, Any]:
        """Return what was noted."""
        return {"started": Clock.started, "steps": Clock.costs, "peak": Clock.peak}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # without permission, the peak is since the process started
            Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0

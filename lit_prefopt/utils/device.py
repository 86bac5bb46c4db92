"""Measure a device's matmul speed and peak memory; detect out-of-memory errors."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "rss"),
)
"""Files with a container's limit of memory and its use, and the name of what cannot be reclaimed,
in both versions of cgroups."""

PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under one of the Trainer's precisions."""
    return PRECISIONS.get(str(precision).split("-")[0], torch.float32)


def matmul_peak(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None, repeats: int = 5
) -> float:
    """Measure TFLOP/s of a large square matrix product of random numbers, the best of some.

    Args:
        dtype: Dtype of the matrices.
        device: Device of the matrices; by default the first GPU, if there is one.
        repeats: Number of timed products.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, together = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / together)
    return 2 * size**3 / best / 1e12


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Reset the memory peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # without permission, the peak is since the process started
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the memory peak since the reset: of the GPU's tensors, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device: of the GPU, or of the host on CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError, ValueError):  # not on every system
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def free_bytes(device: torch.device) -> int:
    """Return the memory that a process can still allocate on a device; 0 if unknown.

    On a GPU it includes what torch's allocator holds unused, on the host what a container's limit
    leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = []
    with suppress(OSError, TypeError):  # not on every system
        text = Path("/proc/meminfo").read_text()
        found = [int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024]  # type: ignore[index]
    for limit, use, name in CONTAINERS:
        with suppress(OSError, ValueError, TypeError):  # in no container, or no limit ("max")
            used = re.search(rf"^{name} (\d+)$", Path(use).read_text(), re.MULTILINE)
            found.append(int(Path(limit).read_text()) - int(used[1]))  # type: ignore[index]
    return max(0, min(found, default=0))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in message or "out of memory" in message
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the precision of autocast on a device, `None` without it, as on the meta device."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)

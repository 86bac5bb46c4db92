"""Copy tensors to a device without synchronizing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without synchronizing (pinned, non-blocking).

    A copy to a GPU is queued like a kernel only from pinned memory. `tensor.to(device)` from
    pageable memory, and `torch.tensor(numbers, device=device)`, wait for all queued work.

    Args:
        tensor: A tensor on the host, or already on the device.
        device: The target device.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

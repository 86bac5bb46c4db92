"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; whatever the device is doing goes on meanwhile.

    Only from pinned memory is a copy to a GPU queued like a kernel. `tensor.to(device)` of ordinary
    memory, and `torch.tensor(numbers, device=device)`, wait for all that was queued before.

    Args:
        tensor: On the host, or already there.
        device: Where it is wanted.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

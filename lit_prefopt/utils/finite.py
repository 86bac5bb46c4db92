"""Check that losses and weights are finite, without a device synchronization at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

OVERFLOWS = 20  # consecutive steps that an fp16 gradient scaler may skip to find its scale


class LossCheck:
    """Finds the optimizer step at which losses stop being finite; its state is on the device.

    Adding a loss and ending a step launch a few operations on single numbers. Only `failed` waits
    for the device, so the caller decides how often that is worth it.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # whether a loss of the current step is not finite
        self._state: Tensor | None = None  # such steps in a row; the step that was one too many

    def add(self, loss: Tensor) -> None:
        """Add the loss of a batch."""
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad

    def forget(self) -> None:
        """Drop the current step's losses, as for a step that is left out."""
        self._bad = None

    def end_step(self, number: int, most: int) -> None:
        """End the current step.

        Args:
            number: Its number, from 1.
            most: Consecutive steps without a finite loss at which the run has failed.
        """
        if self._bad is None:
            return
        if self._state is None:
            self._state = torch.zeros(2, dtype=torch.int64, device=self._bad.device)
        row, failed = self._state
        row = torch.where(self._bad, row + 1, 0)
        failed = torch.where((row >= most) & (failed == 0), number, failed)
        self._state, self._bad = torch.stack([row, failed]), None

    def failed(self) -> Tensor | None:
        """Return the step at which the run has failed, or 0, on the device; None before a step."""
        return None if self._state is None else self._state[1]


def not_finite(tensors: Iterable[tuple[str, Tensor]], bound: float = math.inf) -> list[str]:
    """Return the names of the tensors that have NaN, infinity or a value beyond a bound.

    Reads each tensor once, and synchronizes once per device, whatever the number of tensors.

    Args:
        tensors: Names and tensors; integers and tensors without values are passed over.
        bound: Magnitude that all values must be below.
    """
    extremes: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            values = tensor.detach()
            if values.element_size() == 1:  # float8 has no minimum
                values = values.float()
            ends = torch.stack(torch.aminmax(values))  # NaN where one is NaN
            extremes.setdefault(tensor.device, {})[name] = ends.float()
    wrong = []
    for found in extremes.values():
        within = (torch.stack([*found.values()]).abs() < bound).all(dim=1)  # false for NaN
        wrong += [name for name, good in zip(found, within.tolist(), strict=True) if not good]
    return wrong


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that has NaN or infinity, or None.

    Args:
        tensors: Names and tensors, as for `not_finite`.
    """
    return next(iter(not_finite(tensors)), None)


def tensors_of(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of nested dicts and lists, each with its dotted name.

    Args:
        tree: The nested state.
        name: Prefix of the names.
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))

"""Rows of unequal lengths, stored without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from lit_prefopt.utils.transfer import to_device


@dataclass(eq=False)
class Ragged:
    """Rows of unequal lengths, stored without padding: one row per prompt.

    Lengths are plain numbers, so that repeating and padding never wait for a device.

    Args:
        values: All rows one after the other, (sum of the lengths, ...).
        lengths: Length of each row.
    """

    values: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor]) -> Ragged:
        """Return the rows (N_i, ...), of which there is at least one."""
        return cls(torch.cat([*rows]), tuple(len(row) for row in rows))

    @classmethod
    def cat(cls, parts: Sequence[Ragged]) -> Ragged:
        """Concatenate along the rows."""
        values = torch.cat([part.values for part in parts])
        return cls(values, tuple(length for part in parts for length in part.lengths))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the rows, (N_i, ...)."""
        return iter(self.values.split([*self.lengths]))

    @property
    def shape(self) -> torch.Size:
        """Shape of all rows one after the other; its last entry is their width."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    def map(self, fn: Callable[[Tensor], Tensor]) -> Ragged:
        """Apply a function to the values, such as a move to a device."""
        return Ragged(fn(self.values), self.lengths)

    def repeat(self, times: int) -> Ragged:
        """Repeat each row `times` times, one after the other."""
        return self.rows([row for row in range(len(self)) for _ in range(times)])

    def rows(self, which: Tensor | Sequence[int] | slice) -> Ragged:
        """Return the rows of these numbers; a slice of neighbours shares memory."""
        if isinstance(which, slice) and which.step in (None, 1):
            start, stop, _ = which.indices(len(self))
            ends = [0, *accumulate(self.lengths)]
            first, last = ends[start], ends[max(start, stop)]
            return Ragged(self.values[first:last], self.lengths[which])
        every = [*self]
        if isinstance(which, slice):
            which = range(len(self))[which]
        numbers = [int(n) for n in (which.tolist() if isinstance(which, Tensor) else which)]
        if not numbers:
            return Ragged(self.values[:0], ())
        return Ragged.from_rows([every[n] for n in numbers])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Pad with zeros: rows (B, N, ...) and mask (B, N) bool, True at what is no padding.

        N is the length of the longest row.
        """
        longest = max(self.lengths, default=0)
        rows = self.values.new_zeros(len(self), longest, *self.values.shape[1:])
        if len(self):
            rows = torch.nn.utils.rnn.pad_sequence([*self], batch_first=True)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        mask = torch.arange(longest) < lengths[:, None]
        return rows, to_device(mask, self.device)


def register_pytree(kind: type, parts: tuple[str, ...], *fixed: str) -> None:
    """Register a record with torch's trees, so that fake tensors can stand in for its own.

    Args:
        kind: Class of the record.
        parts: Attributes with tensors.
        fixed: Other attributes.
    """

    def flatten(record: Any) -> tuple[list[Any], Any]:
        own = vars(record)
        return [own[name] for name in parts], tuple(own[name] for name in fixed)

    def unflatten(values: Any, others: Any) -> Any:
        made: Any = object.__new__(kind)  # without checks, since leaves need not be tensors
        vars(made).update(zip((*parts, *fixed), (*values, *others), strict=True))
        return made

    name = f"{kind.__module__}.{kind.__qualname__}"
    register_pytree_node(kind, flatten, unflatten, serialized_type_name=name)


register_pytree(Ragged, ("values",), "lengths")

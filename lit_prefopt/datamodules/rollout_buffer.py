"""Buffer of collected roll-outs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic

import torch
from torch import Tensor

from lit_prefopt.batches import (
    Rows,
    Steps,
    concatenate,
    record_from_tensors,
    select_rows,
    tensors_by_name,
)

Draw = Callable[[Rows, Tensor, Tensor], Steps]
"""Function that makes a batch of these rows (B,) and seeds (B,) of one round."""


class RolloutBuffer(Generic[Rows]):
    """First-in, first-out buffer of rows, stored in the rounds that collected them.

    Rounds are never concatenated: at the size of real models they would need the memory twice.

    Args:
        kind: Record type of a round.
    """

    def __init__(self, kind: type[Rows]) -> None:
        self.kind: type[Rows] = kind
        self.rounds: list[Rows] = []

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(len(one.seeds) for one in self.rounds)

    def add(self, one: Rows, most: int | None = None) -> None:
        """Add a round on the CPU, and drop the oldest rows above a number of rows."""
        host = {name: value.cpu() for name, value in tensors_by_name(one).items()}
        self.rounds.append(record_from_tensors(self.kind, host))
        while most is not None and len(self) > most:
            over, oldest = len(self) - most, self.rounds.pop(0)
            if over < len(oldest.seeds):
                self.rounds.insert(0, select_rows(oldest, slice(over, None)))

    def batch(self, which: Tensor, seeds: Tensor, draw: Draw[Rows]) -> Steps:
        """Return the batch of these rows, in their order.

        Args:
            which: Rows, counted from the oldest, (B,) int64.
            seeds: Seeds of the rows, (B,) int64.
            draw: Function that makes a batch of rows of one round.
        """
        parts, places = [], []
        for one, first in self._firsts():
            mine = ((which >= first) & (which < first + len(one.seeds))).nonzero().flatten()
            if len(mine):
                parts.append(draw(one, which[mine] - first, seeds[mine]))
                places.append(mine)
        return select_rows(concatenate(parts), torch.cat(places).argsort())

    def _firsts(self) -> Iterator[tuple[Rows, int]]:
        first = 0
        for one in self.rounds:
            yield one, first
            first += len(one.seeds)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of round 3 as `3.NAME`."""
        return {
            f"{number}.{name}": value.contiguous()
            for number, one in enumerate(self.rounds)
            for name, value in tensors_by_name(one).items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors that `tensors` returned."""
        named: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            number, name = key.split(".", 1)
            named.setdefault(int(number), {})[name] = value
        self.rounds = [record_from_tensors(self.kind, named[number]) for number in sorted(named)]

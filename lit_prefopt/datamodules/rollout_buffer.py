"""Buffer of collected roll-outs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Protocol

import torch
from torch import Tensor

from lit_prefopt.batches import Pairs, Steps, Trajectories
from lit_prefopt.record_rows import (
    Rows,
    concatenate,
    record_from_tensors,
    select_rows,
    tensors_by_name,
)

Draw = Callable[[Rows, Tensor, Tensor], Any]
"""Function that makes a batch of these rows (B,) and seeds (B,) of one round."""


class Collector(Protocol):
    """The part of an on-policy method that collects roll-outs and draws batches from them."""

    COLLECTS: ClassVar[type[Steps] | type[Trajectories] | type[Pairs]]

    def collect(self, texts: list[str], seeds: Tensor) -> Any:
        """Return the roll-outs of B prompts."""

    def complete(self, rounds: list[Any]) -> list[Any]:
        """Return a collection's records, with what depends on all of them, on all ranks."""

    def draw(self, collected: Any, which: Tensor, seeds: Tensor) -> Any:
        """Return a batch from these rows of collected roll-outs."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode."""

    def eval(self) -> Any:
        """Set evaluation mode."""


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

    def complete(self, count: int, complete: Callable[[list[Rows]], list[Rows]]) -> None:
        """Replace the newest rounds, those of a collection, by what a function makes of them.

        Args:
            count: Number of rounds; fewer, if some were dropped again.
            complete: Function of the rounds that returns as many.
        """
        first = max(len(self.rounds) - count, 0)
        self.rounds[first:] = complete(self.rounds[first:])

    def batch(self, which: Tensor, seeds: Tensor, draw: Draw[Rows]) -> Any:
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

"""LRU cache for expensive values: blocks of a plan, open files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """LRU cache that computes missing values.

    Args:
        size: Maximum number of values.
        make: Computes the value of a key.
        drop: Called with an evicted value.
    """

    def __init__(
        self, size: int, make: Callable[[K], V], drop: Callable[[V], object] | None = None
    ) -> None:
        self.size, self.make, self.drop = size, make, drop
        self.values: OrderedDict[K, V] = OrderedDict()

    def __call__(self, key: K) -> V:
        """Return the value of a key, computed on a miss."""
        if key not in self.values:
            self.values[key] = self.make(key)
        self.values.move_to_end(key)
        while len(self.values) > self.size:
            _, old = self.values.popitem(last=False)
            if self.drop:
                self.drop(old)
        return self.values[key]

"""Undo what a dry run changes: attributes of networks, and results that their methods cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn


@contextmanager
def restored(objects: Iterable[Any]) -> Iterator[None]:
    """Restore the attributes of objects after the block, with the items of their dicts and lists.

    Args:
        objects: Networks, and other objects with a `__dict__`.
    """
    before = [(vars(x), {name: (v, _items(v)) for name, v in vars(x).items()}) for x in objects]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            for name, (value, items) in kept.items():
                attributes[name] = value
                if isinstance(value, dict):
                    _refill(value, items)
                elif isinstance(value, list):
                    value[:] = items


@contextmanager
def without_cached_results(network: nn.Module) -> Iterator[None]:
    """Disable `functools.lru_cache` on the methods of a network's modules inside the block.

    Nothing is read from their caches and nothing is added; as before afterwards.

    Args:
        network: The network.
    """
    classes = {base for module in network.modules() for base in type(module).__mro__}
    methods = [(one, name, method) for one in classes for name, method in vars(one).items()]
    cached = [entry for entry in methods if _uncached(entry[2]) is not None]
    for one, name, method in cached:
        setattr(one, name, _uncached(method))
    try:
        yield
    finally:
        for one, name, method in cached:
            setattr(one, name, method)


def parts_with_state(network: nn.Module) -> Iterator[Any]:
    """Yield a network's modules, and the plain objects that they hold, hooks among them.

    Such an object may keep a table of positions that its first call computes (Z-Image), or what it
    set its layers to (`KeepInputs`).

    Args:
        network: The network.
    """
    seen: set[int] = set()
    for module in network.modules():
        yield module
        for value in chain.from_iterable(map(_held, vars(module).values())):
            if id(value) not in seen and _is_plain(value):
                seen.add(id(value))
                yield value


def _held(value: Any) -> Iterable[Any]:
    """Return an attribute's values: those of a dict or list, or itself."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else [value]


def _is_plain(value: Any) -> bool:
    """Return whether a value is an object with attributes, and no network, tensor or function."""
    if isinstance(value, nn.Module | Tensor | type) or callable(getattr(value, "__get__", None)):
        return False
    return hasattr(value, "__dict__")


def _items(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list) else None


def _refill(kept: dict[Any, Any], items: dict[Any, Any]) -> None:
    if kept.keys() != items.keys() or any(kept[key] is not items[key] for key in items):
        kept.clear()
        kept.update(items)


def _uncached(method: Any) -> Any:
    """Return the function below `lru_cache`, also if diffusers wraps it; None if there is none."""
    inner = (cell.cell_contents for cell in getattr(method, "__closure__", None) or ())
    for one in (method, *inner):
        if isinstance(one, functools._lru_cache_wrapper):
            return one.__wrapped__
    return None

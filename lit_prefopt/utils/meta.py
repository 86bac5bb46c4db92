"""Build networks on the meta device, where weights have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

T = TypeVar("T")

_ACTIVE: ContextVar[bool] = ContextVar("networks without weights", default=False)


@contextmanager
def meta_weights() -> Iterator[None]:
    """Build networks on the meta device inside the block, where their weights would be loaded.

    Only configurations and tokenizers are read.
    """
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def on_meta() -> bool:
    """Return whether networks are built without their weights."""
    return _ACTIVE.get()


def build_on_meta(build: Callable[[], T], dtype: torch.dtype) -> T:
    """Build a network on the meta device.

    Args:
        build: Function that returns the network.
        dtype: Precision of its weights.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(before)

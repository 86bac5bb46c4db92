"""Postpone the import of bitsandbytes, which diffusers imports wherever it is installed."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class PostponedModule:
    """Lazy module, imported on the first access to one of its attributes.

    Args:
        name: The module's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def postpone_bitsandbytes() -> None:
    """Import diffusers' quantizers with a lazy bitsandbytes.

    bitsandbytes takes a second to import, and is needed only for quantization by diffusers.
    """
    quantizers = "diffusers.quantizers.bitsandbytes.utils"
    if quantizers in sys.modules or "bitsandbytes" in sys.modules:
        return
    utils: Any = importlib.import_module("diffusers.utils.import_utils")
    if not getattr(utils, "_bitsandbytes_available", False):
        return
    utils._bitsandbytes_available = False  # while the quantizers' module is imported
    try:
        module: Any = importlib.import_module(quantizers)
    finally:
        utils._bitsandbytes_available = True
    module.bnb = PostponedModule("bitsandbytes")

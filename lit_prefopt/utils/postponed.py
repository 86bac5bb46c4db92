"""Postpone the import of bitsandbytes, which diffusers and peft import wherever it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any


class PostponedModule:
    """Lazy module, imported on the first access to one of its attributes.

    Args:
        spec: The module's spec.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        self.__spec__ = spec

    def __getattr__(self, name: str) -> Any:
        module = self.__spec__.name
        if sys.modules.get(module) is self:  # type: ignore[comparison-overlap]
            del sys.modules[module]
        return getattr(importlib.import_module(module), name)


def postpone_bitsandbytes() -> None:
    """Import diffusers' quantizers and peft with a lazy bitsandbytes.

    bitsandbytes takes a second to import, and is needed only for quantization.
    """
    name = "bitsandbytes"
    if name in sys.modules or "diffusers.quantizers.bitsandbytes.utils" in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    modules: dict[str, Any] = sys.modules
    modules[name] = stand_in = PostponedModule(spec)
    try:
        importlib.import_module("diffusers.quantizers.bitsandbytes.utils")
        importlib.import_module("peft")
    finally:
        if modules.get(name) is stand_in:
            del modules[name]

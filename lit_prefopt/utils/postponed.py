"""Postpone the import of bitsandbytes, which diffusers and peft import wherever it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any


class PostponedModule:
    """Stands for a module, which is imported with the first access to one of its names.

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
    """Import diffusers' quantizers and peft with a bitsandbytes that is imported on first use.

    It takes a second to import, and runs that quantize nothing need none of it.
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

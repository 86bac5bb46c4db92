"""Postpone the import of torch._dynamo, which diffusers and lightning import without compiling."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"

KNOWN = ("2.13",)
"""Versions of torch whose imports work in this order; with others nothing is postponed."""


class PostponedDynamo(ModuleType):
    """Stand-in of torch._dynamo, replaced by the real package on the first use of it.

    Where nothing is compiled, libraries only mark functions and classes (not traced, allowed in
    graphs, constant), and check whether a module is a compiled one. The marks are made in the
    real package when it is imported. Every other attribute imports it.

    Args:
        spec: The real package's spec.
    """

    _real: ModuleType | None
    _marks: list[tuple[str, Any]]

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(NAME)
        vars(self).update(
            __spec__=spec,
            __file__=spec.origin,
            __path__=list(spec.submodule_search_locations or ()),
            OptimizedModule=_compiled_modules(self),
            _real=None,
            _marks=[],
        )

    def load(self) -> ModuleType:
        """Import the real package, once."""
        if self._real is None:
            if sys.modules.get(NAME) is self:
                del sys.modules[NAME]
            real = importlib.import_module(NAME)
            vars(self)["_real"] = real
            for name, module in list(sys.modules.items()):
                parent, _, child = name.rpartition(".")
                if parent == NAME and not hasattr(real, child):
                    setattr(real, child, module)
            for how, one in self._marks:
                getattr(real, how)(one)
        return self._real  # type: ignore[return-value]

    def allow_in_graph(self, one: Any) -> Any:
        """Mark a class or function as allowed in graphs."""
        return self._mark("allow_in_graph", one)

    def assume_constant_result(self, one: Any) -> Any:
        """Mark a function as one whose result is constant."""
        return self._mark("assume_constant_result", one)

    def _mark(self, how: str, one: Any) -> Any:
        """Mark a class or function as soon as the real package is imported."""
        if self._real is not None:
            return getattr(self._real, how)(one)
        self._marks.append((how, one))
        return one

    def disable(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Mark a function as not traced; until something can trace, it is called directly."""
        if self._real is not None or not callable(function):
            return self.load().disable(function, *args, **kwargs)
        marked: list[Any] = []

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            if self._real is None:
                return function(*values, **named)
            if not marked:
                marked.append(self._real.disable(function, *args, **kwargs))
            return marked[0](*values, **named)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` looks for them in every module
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        return getattr(self.load(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, ModuleType):  # the import system's
            vars(self)[name] = value
        else:
            setattr(self.load(), name, value)


class _Submodules(MetaPathFinder):
    """Finder of submodules, which imports the real package before those that depend on it."""

    def __init__(self, stand_in: PostponedDynamo) -> None:
        self.stand_in = stand_in

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a submodule; None for all other modules."""
        if not name.startswith(f"{NAME}.") or sys.modules.get(NAME) is not self.stand_in:
            return None
        spec = PathFinder.find_spec(name, self.stand_in.__path__)
        if spec is None or not _depends_on_package(spec):
            return spec
        self.stand_in.load()
        module = sys.modules.get(name)
        return spec if module is None else ModuleSpec(name, _Loaded(module))


class _Loaded(Loader):
    """Loader of a module that was imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; it is not executed again."""
        module.__spec__ = self.spec


def _depends_on_package(spec: ModuleSpec) -> bool:
    """Return whether a submodule imports anything of its package."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return True
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level:
                return True
        else:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        if any(f"{name}.".startswith(f"{NAME}.") for name in names):
            return True
    return False


def _compiled_modules(stand_in: PostponedDynamo) -> type:
    """Return a class whose instances are those of `OptimizedModule`: none until the import."""

    class Kind(type):
        def __instancecheck__(cls, one: Any) -> bool:
            real = stand_in._real
            return real is not None and isinstance(one, real.OptimizedModule)

        def __subclasscheck__(cls, one: type) -> bool:
            real = stand_in._real
            return real is not None and issubclass(one, real.OptimizedModule)

    return Kind("OptimizedModule", (), {})


def postpone_dynamo() -> None:
    """Put the stand-in in place of torch._dynamo, if it is not imported yet."""
    version = ".".join(importlib.metadata.version("torch").split(".")[:2])
    if NAME in sys.modules or version not in KNOWN:
        return
    import torch  # noqa: F401 - the parent, whose import takes 2 s

    spec = importlib.util.find_spec(NAME)
    if spec is None or NAME in sys.modules:
        return
    stand_in = PostponedDynamo(spec)
    sys.modules[NAME] = stand_in
    sys.meta_path.insert(0, _Submodules(stand_in))

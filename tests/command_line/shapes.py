"""Classes small enough for a parser that is built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jsonargparse import ActionConfigFile

from lit_prefopt.command_line.parser import PlainParser


class Optimizer:
    """Moves weights."""

    def __init__(self, lr: float, warmup: int = 0) -> None: ...


class Adam(Optimizer):
    """Moves them by moments."""


class Judge:
    """Scores images."""

    def __init__(self, size: int = 3) -> None: ...


class Model:
    """Is trained."""


class Plain(Model):
    """Is trained plainly.

    Args:
        optimizer: Moves the weights.
        beta: Pull to the reference.
        kind: One of two kinds.
        judge: Scores images.
        link: A function.
        limit: A number or nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        beta: float,
        kind: Literal["a", "b"] = "a",
        judge: Judge | None = None,
        link: Callable[[int], int] = abs,
        limit: int | None = None,
    ) -> None: ...


class Callback:
    """Is called."""


class Evaluation(Callback):
    """Is called to evaluate."""

    def __init__(self, judge: Judge, every: int = 1) -> None: ...


def small_parser() -> PlainParser:
    """Return a parser of the same parts as that of `lit-prefopt fit`."""
    parser = PlainParser()
    fit = PlainParser(prog="lit-prefopt fit", description="Trains.")
    fit.add_argument("--config", "-c", action=ActionConfigFile, help="A recipe.")
    fit.add_subclass_arguments(Model, "model", required=False)
    fit.add_argument("--trainer.callbacks", type=list[Callback] | Callback | None, help="Called.")
    fit.add_argument("--trainer.max_steps", type=int, default=1, help="Steps.", metavar="N")
    fit.add_argument("--trainer.precision", type=Literal[64, 32] | Literal["mixed"] | None)
    fit.add_argument("--trainer.fast", type=bool, required=True, help="Whether it is fast.")
    parser.add_subcommands().add_subcommand("fit", fit)
    return parser

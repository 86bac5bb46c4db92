"""Check weights: finite values and no missing tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.utils.finite import not_finite

LARGEST = 1e10
"""Magnitude that no weight has; a flipped bit of an exponent exceeds it by far."""


def check_finite(tensors: Mapping[str, Tensor], source: str, cure: str) -> None:
    """Check that tensors contain no NaN, no infinity and no absurdly large value.

    Each tensor is read once, at the speed of the memory.

    Args:
        tensors: The tensors by name.
        source: What contains them, the subject of the message.
        cure: Remedy, for the message.

    Raises:
        InputError: At least one does.
    """
    if wrong := not_finite(tensors.items(), LARGEST):
        raise InputError(
            f"{source} contains NaN, infinite or absurdly large values in {len(wrong)} of its "
            f"{len(tensors)} tensors ({some_names(wrong)}): {cure}."
        )


def check_weights(model: nn.Module, source: str, missing: Iterable[str] = ()) -> None:
    """Check that a loaded network has all of its weights, and that they are finite.

    Args:
        model: The network.
        source: Where it was loaded from, for messages.
        missing: Names of the weights that the loader did not find.

    Raises:
        InputError: A weight is missing, NaN or infinite.
    """
    state = model.state_dict()
    if missing := sorted({*missing, *(name for name, t in state.items() if t.is_meta)}):
        raise missing_tensors(source, missing, len(state))
    check_finite(state, source, "use a copy that is not damaged")


def missing_tensors(source: str, missing: list[str], total: int) -> InputError:
    """Return the error for weights that lack tensors.

    Args:
        source: What lacks them.
        missing: Their names.
        total: Number of tensors that it should have.
    """
    return InputError(
        f"{source} lacks {len(missing)} of {total} tensors ({some_names(missing)}): use a complete "
        "copy of the weights."
    )


def some_names(names: Iterable[str], most: int = 3) -> str:
    """Return the first names of a list and the number of the others, bounded in length.

    Args:
        names: All names.
        most: Maximum number of names that are listed.
    """
    names = list(names)
    shown = [name if len(name) <= 100 else f"{name[:60]}...{name[-30:]}" for name in names[:most]]
    more = len(names) - len(shown)
    return ", ".join(repr(name)[1:-1] for name in shown) + (f" and {more} more" if more else "")


def contents(names: Iterable[str], most: int = 6) -> str:
    """Return a short summary of tensor names: their beginnings with their numbers.

    Args:
        names: All names.
        most: Maximum number of beginnings that are listed.
    """
    counts: dict[str, int] = {}
    for name in names:
        start = ".".join(name.split(".")[:2])
        counts[start] = counts.get(start, 0) + 1
    if not counts:
        return "nothing"
    order = sorted(counts, key=lambda start: -counts[start])
    return some_names([f"{start} ({counts[start]})" for start in order], most)


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error's message, bounded in length, or its type's name.

    Args:
        error: The error.
        most: Maximum number of characters.
    """
    line: Any = next((line for line in str(error).splitlines() if line.strip()), "")
    return line.strip()[:most] or type(error).__name__

"""Input errors with a one-sentence message for the user."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

TRACE = "LIT_PREFOPT_TRACE"  # environment variable that enables tracebacks, for debugging


class InputError(ValueError):
    """Invalid user input; the message is one sentence with cause and cure.

    The command line prints the message without a traceback.
    """


class UsageError(InputError):
    """A command line or recipe names something that does not exist; the exit code is 2."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """Return the end of a message with the names closest to an unknown one.

    Args:
        name: The unknown name.
        known: All known names.
        otherwise: The text if none of them is close; by default a list of all.
        most: Maximum number of close names.
    """
    known = sorted(set(known))
    # first the names that hold all its parts, as toy-diffusion-dpo holds those of toy-dpo
    parts = set(re.split(r"[-._]", name))
    whole = [one for one in known if parts <= set(re.split(r"[-._]", one))]
    near = list(dict.fromkeys([*whole, *get_close_matches(name, known, n=most)]))[:most]
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else otherwise or f"choose one of {', '.join(known)}."
    )


def check_number(
    name: str,
    value: float | None,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
) -> None:
    """Check that a number is finite and in its range; None is accepted.

    Args:
        name: Its key in the recipe.
        value: The number.
        least: Minimum.
        most: Maximum.
        above: Exclusive lower bound.

    Raises:
        InputError: The number is out of range or not finite.
    """
    if value is None or (math.isfinite(value) and least <= value <= most and value > above):
        return
    ranges = [f"above {above:g}" if above > -math.inf else ""]
    ranges += [f"from {least:g}" if least > -math.inf else ""]
    ranges += [f"up to {most:g}" if most < math.inf else ""]
    words = " ".join(word for word in ranges if word) or "that is finite"
    raise InputError(f"{name} is {value}; give a number {words}.")


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and its explicit causes (`raise ... from`), without its contexts."""
    return [] if error is None else [error, *causes(error.__cause__)]


def is_from(error: BaseException, package: str) -> bool:
    """Return whether an exception was raised by the code of a package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name: Any = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).split(".")[0] == package

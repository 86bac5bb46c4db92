"""The one exception that is meant for the user's eyes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

TRACE = "LIT_PREFOPT_TRACE"  # an environment variable for those who look for a bug


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names the cure.

    The command line prints the sentence without a trace.
    """


class UsageError(InputError):
    """A command line or recipe names something that does not exist; the exit code is 2."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """Return the end of a message that names what is nearest to a name.

    Args:
        name: The name that does not exist.
        known: The names that do.
        otherwise: What is said where none of them is near; a list of all if it is not given.
        most: Largest number of near names.
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
    """Refuse a number that is out of its range or not finite; None is nothing to refuse.

    Args:
        name: What the recipe calls it.
        value: The number.
        least: Smallest number that can be used.
        most: Largest one.
        above: What it must exceed.

    Raises:
        InputError: The number cannot be used.
    """
    if value is None or (math.isfinite(value) and least <= value <= most and value > above):
        return
    ranges = [f"above {above:g}" if above > -math.inf else ""]
    ranges += [f"from {least:g}" if least > -math.inf else ""]
    ranges += [f"up to {most:g}" if most < math.inf else ""]
    words = " ".join(word for word in ranges if word) or "that is finite"
    raise InputError(f"{name} is {value}; give a number {words}.")


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and those that it was raised from, not those handled before it."""
    return [] if error is None else [error, *causes(error.__cause__)]


def is_from(error: BaseException, package: str) -> bool:
    """Whether an exception was raised by the code of a package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name: Any = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).split(".")[0] == package

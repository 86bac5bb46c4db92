"""Input errors with a one-sentence message for the user."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, overload
from urllib.parse import unquote

TRACE = "LIT_PREFOPT_TRACE"  # environment variable that enables tracebacks, for debugging

QUOTED = 80  # maximum length of a quoted value
WORD = 400  # of a word in a message, such as a path or an address
MESSAGE = 2000  # of a message
HIDDEN = "***"
REPR = Repr()
REPR.maxstring = REPR.maxother = REPR.maxlong = QUOTED
USER_INFO = re.compile(
    # to the last @ of the host's part; a password may contain a slash, which ends that part
    r"(?<=://)"
    r"(?:[^\s\"'/?#]{1,2000}|[^\s\"'/?#@:[]{0,2000}:(?!\d+(?:[/?#]|$))[^\s\"']{0,2000}?)@"
)
NO_SECRET = ("abfs", "abfss", "az")  # the name before @ is a container
PARAMETER = re.compile(r"(?<=[?&;#])([^\s?&;#=]+)=([^\s?&;#'\"]+)")
SECRET = re.compile(
    r".*(?:token|secret|password|passwd|passphrase|signature)|credentials?|sig|sas|pass|pwd|pw|"
    r"(?:api|access|account|app|auth|master|private|secret|shared|storage|subscription|user)?key|"
    r"auth|authorization|bearer|jwt"
)
"""Words in the names of secret parameters, such as X-Amz-Signature, AWSAccessKeyId, api_key."""


class InputError(ValueError):
    """Invalid user input; the message is one sentence with cause and cure.

    The command line prints the message without a traceback. Secrets in addresses are hidden,
    control characters escaped, and overlong values shortened.

    Args:
        message: The sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(InputError):
    """A command line or recipe names something that does not exist; the exit code is 2."""


def quoted(value: Any) -> str:
    """Return a value in quotes for a message: escaped, in one line, and of bounded length."""
    if isinstance(value, bytes):  # which Repr would copy whole
        value = value[:QUOTED]
    return shortened(REPR.repr(value), QUOTED)


def printable(message: str) -> str:
    """Return a message without secrets and control characters, and of bounded length."""
    text = "".join(
        char if char == "\n" or char.isprintable() else ascii(char)[1:-1]
        for char in without_secrets(shortened(message, 50 * MESSAGE))  # not of megabytes
    )
    text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: shortened(word[0], WORD), text)
    return shortened(text, MESSAGE)


def shortened(text: str, most: int) -> str:
    """Return a text of at most this length, shortened in the middle."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def without_secrets(text: str) -> str:
    """Return a text in which names, passwords and secret parameters of addresses are hidden."""

    def hidden(found: re.Match[str]) -> str:
        before = text[max(0, found.start() - 20) : found.start() - len("://")]
        scheme = re.split(r"[^a-z0-9]", before.lower())[-1]
        return found[0] if scheme in NO_SECRET and ":" not in found[0] else f"{HIDDEN}@"

    if "://" not in text:
        return text
    return PARAMETER.sub(
        lambda found: f"{found[1]}={HIDDEN}" if is_secret(found[1]) else found[0],
        USER_INFO.sub(hidden, text),
    )


def is_secret(parameter: str) -> bool:
    """Return whether a parameter of an address is a secret, by its name."""
    divided = re.sub(r"([a-z])([A-Z])", r"\1-\2", unquote(parameter))
    return any(SECRET.fullmatch(word) for word in re.split(r"[^a-z0-9]+", divided.lower()))


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


@overload
def check_number(
    name: str, value: float, least: float = ..., most: float = ..., *, above: float = ...
) -> None: ...
@overload
def check_number(
    name: str,
    value: float | None,
    least: float = ...,
    most: float = ...,
    *,
    above: float = ...,
    optional: bool,
) -> None: ...
def check_number(
    name: str,
    value: float | None,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    optional: bool = False,
) -> None:
    """Check that a number is finite and in its range.

    Args:
        name: Its key in the recipe.
        value: The number.
        least: Minimum.
        most: Maximum.
        above: Exclusive lower bound.
        optional: Whether it may be None. The parser accepts None (`null` in a recipe) of any type.

    Raises:
        InputError: The number is out of range, not finite, or None where it is needed.
    """
    if value is None and optional:
        return
    if value is not None and (math.isfinite(value) and least <= value <= most and value > above):
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

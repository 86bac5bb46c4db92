"""Commands that documents and messages quote: find them, and parse them with the real parser."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import patch

import yaml

from lit_prefopt.cli import main
from lit_prefopt.lightning_cli import PreferenceCLI

FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(lit-prefopt [^`]+)`")
START = re.compile(r"(?:^|\s)(?:lit-prefopt|-m lit_prefopt\.cli)\s")
LOOP = re.compile(r"^for (\w+) in (\S+).*; do$")
TITLE = re.compile(r'title="([^"]+)"')
REQUIRED = re.compile(r"^  --([\w.]+) (?:(?!^  --).)*?\(required", re.MULTILINE | re.DOTALL)
FUNCTIONS = ("shards", "export", "report", "rounds")
"""Commands that are functions; the others are the trainer's."""


class Parsed(Exception):
    """Stops a command of the trainer as soon as its arguments are understood."""


def titled_files(markdown: str) -> dict[str, str]:
    """Return the contents of the code blocks that have a title, by that title."""
    found = ((TITLE.search(info), body) for _, info, body in FENCE.findall(markdown))
    return {title[1]: body for title, body in found if title}


def fenced_commands(markdown: str) -> list[list[str]]:
    """Return the arguments of every `lit-prefopt` command in the code blocks without a title."""
    blocks = [body for _, info, body in FENCE.findall(markdown) if not TITLE.search(info)]
    return [arguments for block in blocks for arguments in _commands(block)]


def inline_commands(text: str) -> list[list[str]]:
    """Return the arguments of every `lit-prefopt` command with options between two backticks."""
    spans = [" ".join(span.split()) for span in INLINE.findall(FENCE.sub("", text))]
    whole = (span for span in spans if " --" in span and "..." not in span)
    return [arguments for span in whole for arguments in _commands(span)]


def _commands(block: str) -> Iterator[list[str]]:
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        loop, start = LOOP.match(line.strip()), START.search(line)
        if loop:
            variables[f"${loop[1]}"] = loop[2]
        if start:
            rest = line[start.end() :]
            for name, value in variables.items():
                rest = rest.replace(name, value)
            yield shlex.split(rest, comments=True)


def parse_error(arguments: list[str]) -> str | None:
    """Return why the command line refuses arguments, None if it accepts them; nothing is run.

    Args:
        arguments: What follows `lit-prefopt`.
    """
    if any(part == "--help" or part.endswith(".help") for part in arguments):
        return _run(arguments)[0]
    if arguments[0] not in FUNCTIONS:
        # What comes next would load weights: by then all arguments are parsed and checked.
        with patch.object(PreferenceCLI, "before_instantiate_classes", side_effect=Parsed):
            return _run(arguments)[0]
    error, printed = _run([*arguments, "--print_config"])
    if error:
        return error
    command = arguments[:2] if arguments[0] == "shards" else arguments[:1]
    config: dict[str, Any] = yaml.safe_load(printed)
    _, described = _run([*command, "--help"])
    missing = [name for name in REQUIRED.findall(described) if config.get(name) is None]
    return f"not given, but required: {', '.join(missing)}" if missing else None


def _run(arguments: list[str]) -> tuple[str | None, str]:
    """Return the error of a command that ends before it does anything, and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    except Parsed:
        return None, out.getvalue()
    except SystemExit as stop:
        if not stop.code:
            return None, out.getvalue()
        return f"{stop.code} {err.getvalue()}".strip(), out.getvalue()
    raise AssertionError(f"The command was run, not only parsed: {shlex.join(arguments)}")

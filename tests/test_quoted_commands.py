"""Commands that messages and docstrings of the package quote are parsed by the real parser."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.quoted_commands import INLINE, parse_error

PACKAGE = Path(__file__).parents[1] / "lit_prefopt"


def texts(path: Path) -> Iterator[str]:
    """Yield the strings of a file; what an f-string fills in is X."""
    tree = ast.parse(path.read_text())
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in formatted for part in node.values}
    for node in formatted:
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def quoted(path: Path) -> set[str]:
    """Return the commands with arguments that a file quotes between backticks."""
    found = {" ".join(span.split()) for text in texts(path) for span in INLINE.findall(text)}
    return {span for span in found if " --" in span or span.endswith(" X")}


COMMANDS = sorted({span for path in PACKAGE.rglob("*.py") for span in quoted(path)})


def test_some_are_found() -> None:
    assert "lit-prefopt shards index --folder X" in COMMANDS
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_quoted_command_parses(command: str) -> None:
    assert parse_error(shlex.split(command)[1:]) is None


def test_a_positional_folder_is_found(tmp_path: Path) -> None:
    file = tmp_path / "message.py"
    file.write_text('def cure(x): return f"make it with `lit-prefopt shards index {x}`."')
    [command] = quoted(file)
    assert parse_error(shlex.split(command)[1:])

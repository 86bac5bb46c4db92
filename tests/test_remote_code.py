"""No code of a checkpoint is executed: transformers is never free to choose."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_prefopt"


def from_transformers(tree: ast.Module) -> set[str]:
    """Return the names that a module imports from transformers."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {a.asname or a.name for n in nodes if n.module == "transformers" for a in n.names}


def unsafe(source: str) -> Iterator[int]:
    """Yield the lines that load by transformers without `trust_remote_code=False`."""
    tree = ast.parse(source)
    known = from_transformers(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        named = isinstance(owner, ast.Name) and owner.id in known
        config = isinstance(owner, ast.Attribute) and owner.attr == "config_class"
        if node.func.attr == "from_pretrained" and (named or config):
            stated = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
            if not any(isinstance(x, ast.Constant) and x.value is False for x in stated):
                yield node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_load_by_transformers_forbids_code() -> None:
    found = {str(f.relative_to(PACKAGE)): [*unsafe(f.read_text("utf-8"))] for f in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}
    loads = sum(f.read_text("utf-8").count("trust_remote_code=False") for f in FILES)
    assert loads >= 10


@pytest.mark.parametrize("argument", ["", ", trust_remote_code=True"])
def test_a_load_that_allows_code_is_found(argument: str) -> None:
    source = f"from transformers import CLIPModel\nCLIPModel.from_pretrained('x'{argument})\n"
    assert [*unsafe(source)] == [2]

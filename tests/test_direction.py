"""One direction of travel: imports go from the upper rooms of the package to the lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lit_prefopt"

# From the ground up. A room may import rooms of the lines below its own, and of its own line only
# itself. A name is a folder or a file of the package, the longest that fits.
LEVELS = [
    ["errors", "lazy", "data"],
    ["utils", "losses", "reward_losses", "configs", "families"],
    ["ragged"],
    ["conditioning"],
    ["batches"],
    ["record_rows"],
    ["processes", "weights", "data.images", "recipe_files"],
    ["recipe_strings"],
    ["command_line"],
    ["data.shards", "backbones"],
    ["data.order", "diffusion"],
    ["data.loading"],
    ["data.latents"],
    ["prepare", "export", "metrics", "optimizers", "strategies", "effective_batch", "fit_loop"],
    ["prompts"],
    ["reward_groups", "moving_average"],
    ["datamodules"],
    ["learner"],
    ["judges", "cache_checks", "runs"],
    ["fit_caches"],
    ["estimate"],
    ["module"],
    ["on_policy", "pairwise"],
    ["group_rollouts"],
    ["generate", "methods"],
    ["evaluate"],
    ["callbacks"],
    ["toy"],
    ["lightning_cli"],
    ["commands"],
    ["cli"],
]


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of the package by their dotted names below it."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    names = [".".join(f.relative_to(root / PACKAGE).with_suffix("").parts) for f in files]
    return {n.removesuffix("__init__").rstrip("."): f for n, f in zip(names, files, strict=True)}


def imports(path: Path, known: set[str]) -> set[str]:
    """Return the modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            below = [n.removeprefix(f"{PACKAGE}.") for n in inner]
            names = [i if b in known else node.module for i, b in zip(inner, below, strict=True)]
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                found.add(name.removeprefix(PACKAGE).lstrip("."))
    return found


def room(module: str) -> str:
    """Return the room of a module: the longest name of LEVELS that it starts with."""
    rooms = [r for level in LEVELS for r in level if f"{module}.".startswith(f"{r}.")]
    assert rooms, f"{module} stands in no room: give it a line of LEVELS"
    return max(rooms, key=len)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph that a depth-first search closes."""
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that run upwards or across."""
    height = {r: n for n, level in enumerate(LEVELS) for r in level}
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room(module) != room(other) and height[room(other)] >= height[room(module)]
    ]


def graph_of(root: Path) -> dict[str, set[str]]:
    """Return who imports whom; packages stand for their `__init__`, the root is left out."""
    files = modules(root)
    graph = {name: imports(path, set(files)) - {""} for name, path in files.items() if name}
    return {name: {o for o in others if o != name} for name, others in graph.items()}


def test_no_circles() -> None:
    assert circles(graph_of(ROOT)) == []


def test_imports_run_downwards() -> None:
    assert upward(graph_of(ROOT)) == []


@pytest.mark.parametrize(
    ("imported", "importer"), [("cli", "errors"), ("judges.judge", "datamodules.pairs")]
)
def test_an_upward_import_is_found(imported: str, importer: str) -> None:
    graph = graph_of(ROOT)
    graph[importer] = graph[importer] | {imported}
    assert upward(graph) == [f"{importer} imports {imported}"]


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]


def test_an_import_inside_a_function_counts(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("def late():\n    from lit_prefopt.data import images\n")
    assert imports(file, {"data.images"}) == {"data.images"}

"""README and docs/: their commands parse, their links lead somewhere, the site builds."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.quoted_commands import (
    fenced_commands,
    inline_commands,
    parse_error,
    titled_files,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CLASS = re.compile(r"`([A-Z]\w*[a-z]\w*)`")
PLACES = {"RECIPE": "sd15-diffusion-dpo"}
METHOD = ROOT / "docs" / "add-a-method.md"


def commands() -> list[tuple[str, list[str]]]:
    """Every command of every page, once, with the first page that has it."""
    found: dict[tuple[str, ...], str] = {}
    for page, name in zip(PAGES, NAMES, strict=True):
        text = page.read_text()
        for arguments in fenced_commands(text) + inline_commands(text):
            found.setdefault(tuple(PLACES.get(part, part) for part in arguments), name)
    return [(name, [*arguments]) for arguments, name in found.items()]


@functools.cache
def classes() -> set[str]:
    """The names of all classes of the package."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "lit_prefopt").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def slug(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors of a page."""
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line[:1] == "#"}


def test_commands_are_found() -> None:
    found = commands()
    assert len(found) > 50
    assert {arguments[0] for _, arguments in found} >= {
        *("fit", "test", "predict", "evaluate", "estimate", "rounds", "shards", "export", "report")
    }


@pytest.mark.parametrize(
    ("page", "arguments"),
    commands(),
    ids=[f"{page}:{shlex.join(arguments)}" for page, arguments in commands()],
)
def test_every_command_parses(
    page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs in a folder that holds the files which its page writes, and nothing else."""
    for name, body in titled_files((ROOT / page).read_text()).items():
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command may add folders
    assert parse_error(arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "toy-diffusion-dpo", "--model.betta", "3"],
        ["fit", "--config", "no-such-recipe"],
        ["fit", "--config", "toy-diffusion-dpo", "--trainer.max_steps", "many"],
        ["fit"],
        ["export", "--source", "runs/x", "--to", "kohya"],
        ["export", "--source", "runs/x", "--to", "comfy", "--output", "x.safetensors"],
        ["shards", "convert", "--source", "x.jsonl", "--output", "x", "--columns", "no-such"],
        ["shards", "validate"],
        ["rounds", "--config", "toy-spin", "--number", "3"],
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str]) -> None:
    """The check can fail: misspelt, unknown, missing and mistyped arguments."""
    assert parse_error(arguments)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


# coming-from.md names the classes of other projects, too
@pytest.mark.parametrize("name", [n for n in NAMES if n != "docs/coming-from.md"])
def test_every_class_exists(name: str) -> None:
    """Names like `PairShards` are classes of the package."""
    diffusers = {"StableDiffusionPipeline", "StableDiffusion3Pipeline", "SD3Transformer2DModel"}
    known = classes() | diffusers | {"EarlyStopping", "ModelCheckpoint"}
    assert set(CLASS.findall((ROOT / name).read_text())) <= known


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_240


def run(*command: str, folder: Path) -> None:
    """Run a command on this checkout in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.slow
def test_a_method_outside_the_checkout(tmp_path: Path) -> None:
    """The files of the page in an empty folder: they train, and their tests pass."""
    files = titled_files(METHOD.read_text())
    assert {"my_method.py", "mine.yaml", "test_my_method.py"} <= set(files)
    for name, body in files.items():
        (tmp_path / name).write_text(body)
    steps = ("--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false")
    run("-m", "lit_prefopt.cli", "fit", "--config", "mine.yaml", *steps, folder=tmp_path)
    assert (tmp_path / "runs" / "mine" / "weights").exists()
    run("-m", "pytest", "-q", "test_my_method.py", folder=tmp_path)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """A broken link or a docstring that cannot be read is an error; every recipe has its page."""
    site = tmp_path / "site"
    run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site), folder=ROOT)
    recipes = {path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
    assert recipes
    for recipe in recipes:
        page = (site / "reference" / "recipes" / "fit" / f"{recipe}.html").read_text()
        assert f"{recipe}.yaml" in page
    for package in (ROOT / "lit_prefopt").glob("*/__init__.py"):
        if list(package.parent.glob("[a-z]*.py")):
            name = f"lit_prefopt.{package.parent.name}"
            assert (site / "reference" / "api" / f"{name}.html").exists(), name

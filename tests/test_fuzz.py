"""Recipes spoilt at random: each runs, or is answered by a message; no trace, nothing half-done."""

from __future__ import annotations

import random
import signal
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from lit_prefopt.cli import main
from lit_prefopt.weights.checkpoint import is_complete

CASES = 200
PATIENCE = 60  # seconds
# A wrong number of these starts so many processes, or waits for so many machines.
MANY = {"devices", "num_nodes", "workers", "strategy", "num_threads"}
ODD = ["", " ", "null", "~", "a: b", "{x}", "${HOME}", "%s", "日本", "../..", "a\tb", "-1", "1e400"]
ODD += ["!!python/name:os.system", "*", "&a", "0x", "inf", "nan", "true", "x" * 3000, "\\", "'"]
VALUES: list[Any] = [None, True, False, 0, -1, -0.5, 0.5, 3, [], {}, [1], {"a": 1}, [None], [[]]]
HUGE = [10**6, 2**31, 2**63, 10**30, 1e300, float("inf"), float("-inf"), float("nan")]
CLASSES = ["Nothing", "os.system", "lit_prefopt.methods", "AdamW", "torch.nn.Linear", "Callback"]

Place = tuple[Any, Any]  # a container and a key or index in it


def places(node: Any) -> list[Place]:
    """Return every place of a nested recipe."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found: list[Place] = []
    for key, value in list(items):
        found.append((node, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def spoil(text: str, draws: random.Random) -> str:
    """Return a recipe with one or two of its places changed, or with its text cut or doubled."""
    kind = draws.random()
    if kind < 0.05:
        return text[: draws.randrange(len(text))]
    if kind < 0.1:
        lines = text.splitlines()
        at = draws.randrange(len(lines))
        return "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])
    tree = yaml.safe_load(text)
    for _ in range(draws.choice([1, 1, 2])):
        found = places(tree)
        if draws.random() < 0.4:  # most numbers are valid in form and wrong in size
            found = [(node, key) for node, key in found if type(node[key]) in (int, float)]
        change(*draws.choice(found), draws)
    return yaml.safe_dump(tree, allow_unicode=True)


def change(node: Any, key: Any, draws: random.Random) -> None:
    """Change one place."""
    value = node[key]
    kind = draws.randrange(7)
    if key == "class_path" or (kind == 0 and isinstance(value, dict) and "class_path" in value):
        node[key] = draws.choice(CLASSES)
    elif kind == 1 and isinstance(node, dict):
        letters = list(str(key))
        letters[draws.randrange(len(letters))] = draws.choice("xyz_é ")
        node["".join(letters)] = node.pop(key)
    elif kind == 2:
        del node[key]
    elif kind == 3:
        node[key] = draws.choice(ODD)
    elif kind == 4 and isinstance(value, int | float) and value:
        node[key] = -value
    elif kind == 5 and key not in MANY:
        node[key] = draws.choice(HUGE)
    else:
        node[key] = draws.choice(VALUES)


def too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError("the run hangs")


@pytest.fixture
def whole_recipe(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The resolved text of a small recipe: every key that there is."""
    monkeypatch.chdir(tmp_path)
    for name in ("Guard", "PolicyAveraging", "Interrupts"):
        recipe += ["--trainer.callbacks+", name]
    main(["fit", *recipe, "--trainer.max_steps", "1", "--data.workers", "0"])
    return {"small": (tmp_path / "run" / "recipe.yaml").read_text()}


def outcome(arguments: list[str]) -> str | None:
    """Run one recipe and return the trace of what was no answer, if it was none."""
    signal.alarm(PATIENCE)
    try:
        main(["fit", *arguments])
    except SystemExit as stop:
        return None if stop.code else "it left without a message"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


@pytest.mark.slow
def test_spoilt_recipes_are_answered(
    whole_recipe: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(signal.SIGALRM, too_long)
    failures: list[str] = []
    answered = 0
    for seed in range(CASES):
        draws = random.Random(seed)
        spoilt = spoil(whole_recipe["small"], draws)
        path, run = tmp_path / f"{seed}.yaml", tmp_path / f"run-{seed}"
        path.write_text(spoilt)
        limits = ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
        trace = outcome(["--config", str(path), *limits, "--trainer.default_root_dir", str(run)])
        said = capfd.readouterr()
        answered += "lit-prefopt" in said.err or "error" in said.err
        if trace:
            failures.append(f"--- recipe {seed}\n{trace}")
        failures += [f"recipe {seed} left {left}" for left in half_written(run)]
    signal.signal(signal.SIGALRM, before)
    assert not failures, "\n".join(failures)
    assert answered > CASES / 4


def half_written(run: Path) -> list[Path]:
    """Return the files of a run that are not whole."""
    torn = [path for path in run.rglob(".*") if path.is_file()]
    return torn + [path for path in run.rglob("*.ckpt") if path.is_file() and not is_complete(path)]

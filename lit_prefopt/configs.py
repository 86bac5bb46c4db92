"""Find the shipped recipes: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_prefopt.errors import UsageError, did_you_mean

_HERE = Path(__file__).parent
CONFIGS = next(p for p in (_HERE / "_configs", _HERE.parent / "configs") if p.is_dir())
BASE = CONFIGS / "base.yaml"
PREDICT = CONFIGS / "predict.yaml"
HOMES = {
    "predict": "generate",
    "evaluate": "evaluate",
    "rounds": "rounds",
}  # folders of the other commands' recipes


def recipe_names(home: str = "recipes") -> list[str]:
    """Return the names of the shipped recipes of a kind.

    Args:
        home: Their folder: `recipes` of `fit`, `generate` of `predict`,
            `evaluate`, `rounds`.
    """
    return sorted(path.stem for path in (CONFIGS / home).glob("*.yaml"))


def find_config(name: str, home: str = "recipes") -> Path:
    """Return the file that `--config NAME` means.

    Args:
        name: A path, or the name of a shipped recipe such as `toy-diffusion-dpo`.
        home: The folder of the shipped recipes to search.

    Raises:
        UsageError: Neither a file nor a shipped recipe has that name.
    """
    if Path(name).is_file():
        return Path(name).resolve()
    short = name.removeprefix("configs/")
    for candidate in (f"{home}/{short}.yaml", f"{short}.yaml", short):
        if (CONFIGS / candidate).is_file():
            return (CONFIGS / candidate).resolve()
    near = did_you_mean(name, recipe_names(home), most=3)
    raise UsageError(f"{name} is neither a file nor a shipped recipe; {near}")


def find_columns(name: str) -> Path:
    """Return the file that `shards convert --columns NAME` means.

    Args:
        name: A path, or the name of a shipped set of columns such as `hpdv2`.

    Raises:
        UsageError: Neither a file nor a shipped set has that name.
    """
    shipped = {path.stem: path for path in sorted((CONFIGS / "columns").glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name).resolve()
    if name in shipped:
        return shipped[name].resolve()
    near = did_you_mean(name, shipped)
    raise UsageError(f"{name} is neither a file nor one of the shipped columns; {near}")


def named_columns(args: Sequence[str]) -> list[str]:
    """Return the arguments with the name of shipped columns replaced by its path."""
    separated = [part for arg in args for part in separate(arg, ["--columns"])]
    return [
        str(find_columns(arg)) if before == "--columns" else arg
        for before, arg in zip(("", *separated), separated, strict=False)
    ]


def separate(arg: str, keys: Sequence[str], suffix: str | None = None) -> list[str]:
    """Split `--KEY=VALUE` into two arguments; return any other unchanged.

    Args:
        arg: An argument of the command line.
        keys: The keys that are split.
        suffix: Other keys are split too where the value ends in it.
    """
    key, _, value = arg.partition("=")
    named = suffix is not None and key.startswith("--") and value.endswith(suffix)
    return [key, value] if value and (key in keys or named) else [arg]

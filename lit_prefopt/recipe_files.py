"""Recipe files: parts by path or shipped name, keys that override a part, modules beside a recipe.

A part is a YAML file that describes one object, such as `backbone/sdxl-lora.yaml`. A recipe names
it by a path relative to the recipe itself, or by the name of a shipped one; keys with dots change
it:

    backbone: backbone/sdxl-lora.yaml
    backbone.lora.rank: 64
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lit_prefopt.configs import CONFIGS, HOMES, find_config, separate
from lit_prefopt.errors import UsageError

SHIPPED = ("backbone", "judge", "hardware")  # folders of shipped parts that serve many recipes
PART_KEYS = ("backbone", "data", "judge", "judges", "model", "trainer")  # a path here is a part
SUFFIX = ".yaml"
Load = Callable[[str], Any]


def shipped_parts() -> list[str]:
    """Return the names of the shipped parts, such as `judge/pickscore.yaml`."""
    files = (path for home in SHIPPED for path in sorted((CONFIGS / home).glob(f"*{SUFFIX}")))
    return [path.relative_to(CONFIGS).as_posix() for path in files]


def find_part(key: str, name: str, folder: Path) -> Path | None:
    """Return the file that a value names: one's own where there is one, else a shipped one.

    Args:
        key: Key of the recipe or the command line that has the value.
        name: The value, such as `judge/pickscore.yaml`.
        folder: Folder that relative paths start from.

    Returns:
        The file; None where the value names none and the key may hold other texts.

    Raises:
        UsageError: The value must name a part, and no file has that name.
    """
    if not name.endswith(SUFFIX):
        return None
    named = Path(name)
    if (folder / named).is_file():
        return (folder / named).absolute()
    if ".." not in named.parts and (CONFIGS / named).is_file():
        return CONFIGS / named
    if key.split(".")[-1].removesuffix("+") not in PART_KEYS and named.parts[0] not in SHIPPED:
        return None
    beside = [path.relative_to(folder).as_posix() for path in folder.glob(f"*/*{SUFFIX}")]
    near = get_close_matches(name, sorted({*beside, *shipped_parts()}), n=3, cutoff=0.75)
    homes = ", ".join(f"{home}/NAME{SUFFIX}" for home in SHIPPED)
    cure = f"did you mean {' or '.join(near)}?" if near else f"shipped parts are {homes}."
    raise UsageError(f"{key}: {name} is neither a file in {folder} nor a shipped part; {cure}")


def loader(load: Load) -> Load:
    """Return a loader of YAML texts that resolves the parts in them.

    Args:
        load: Loader of plain YAML. Relative paths start from the current folder, which is that of
            the file while jsonargparse reads one.
    """
    return lambda text: resolve(load(text), Path.cwd(), load)


def resolve(value: Any, folder: Path, load: Load = yaml.safe_load, key: str = "") -> Any:
    """Return what was read from YAML with parts as absolute paths and overrides applied.

    Args:
        value: What was read: mappings, lists and plain values.
        folder: Folder of the file.
        load: Loader of plain YAML.
        key: Key that holds the value.
    """
    if isinstance(value, list):
        return [_named(one, folder, load, key) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: _named(one, folder, load, f"{name}") for name, one in value.items()}
    for name in [name for name in found if "." in f"{name}"]:
        head, *keys = f"{name}".split(".")
        if head in found:
            found[head] = _spec(found[head], load, head)
            _override(found[head], keys, found.pop(name), load)
    return found


def _named(value: Any, folder: Path, load: Load, key: str) -> Any:
    if isinstance(value, str):
        return str(find_part(key, value, folder) or value)
    return resolve(value, folder, load, key)


def _spec(value: Any, load: Load, key: str) -> dict[str, Any]:
    """Return a part as a mapping: a file is read, the name of a class is its `class_path`."""
    if isinstance(value, str) and value.endswith(SUFFIX) and Path(value).is_file():
        path = Path(value)
        value = resolve(load(path.read_text()), path.parent, load)
    if isinstance(value, str):
        return {"class_path": value}
    if not isinstance(value, dict | None):
        raise UsageError(f"{key} is {value}: keys with dots change parts and classes only.")
    return value or {}


def _override(spec: dict[str, Any], keys: Sequence[str], value: Any, load: Load) -> None:
    """Set a key inside a part; arguments of a class are found without `init_args`."""
    key, *rest = keys
    if "class_path" in spec and key not in ("class_path", "init_args", "dict_kwargs"):
        spec = spec.setdefault("init_args", {})
    if rest:
        spec[key] = _spec(spec.get(key), load, key)
        _override(spec[key], rest, value, load)
    else:
        spec[key] = value


def named_recipes(args: Sequence[str]) -> list[str]:
    """Return a command with the names of shipped recipes and parts replaced by paths.

    Args:
        args: The command and its arguments.
    """
    home = HOMES.get(args[0], "recipes")
    resolved: list[str] = []
    separated = [part for arg in args for part in separate(arg, ["--config"], SUFFIX)]
    for before, arg in zip(("", *separated), separated, strict=False):
        if before in ("--config", "-c"):
            arg = str(find_config(arg, home))
        elif before.startswith("--") and "=" not in before:
            arg = str(find_part(before.removeprefix("--"), arg, Path.cwd()) or arg)
        resolved.append(arg)
    return resolved


def allow_own_modules(args: Sequence[str]) -> None:
    """Let recipes name classes of modules beside them or in the current folder.

    Installed packages are found first. Only for commands that run a recipe of the user's: whoever
    reads another's folder as data must not import from it.

    Args:
        args: Arguments of the command, with `--config PATH` for each recipe.
    """
    named = zip(args, args[1:], strict=False)
    recipes = [Path(arg) for before, arg in named if before in ("--config", "-c")]
    folders = [path.resolve().parent for path in recipes if path.is_file()]
    own = [folder for folder in folders if not folder.is_relative_to(CONFIGS.resolve())]
    for folder in (*own, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))

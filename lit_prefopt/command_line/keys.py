"""Check the keys of arguments and recipes against the table of help pages.

What is refused here is refused by the parser too, after it has imported everything. What cannot
be decided, such as the arguments of a class outside the table, is left to the parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_prefopt.command_line.pages import Option
from lit_prefopt.command_line.table import Table
from lit_prefopt.configs import BASE, PREDICT
from lit_prefopt.errors import UsageError, did_you_mean
from lit_prefopt.recipe_files import resolve
from lit_prefopt.recipe_strings import FILES, LOADER, read_recipe, read_yaml, strings, words

IMPORTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
SPEC = ("class_path", "init_args", "dict_kwargs", "help")
Options = dict[str, Option]


def check_keys(args: Sequence[str], table: Table) -> None:
    """Refuse a key or a class that does not exist.

    Args:
        args: A command and its arguments, names of shipped recipes resolved to paths.
        table: Help pages of this package.

    Raises:
        UsageError: There is no such key or class; the message names the nearest one.
    """
    _Check(args, table).run()


class _Check:
    """One check of a command."""

    def __init__(self, args: Sequence[str], table: Table) -> None:
        self.args, self.table = list(args[1:]), table
        self.options = table.options(args[0])
        files = read_recipe(self.args, [BASE, PREDICT])
        self.words = words(self.args, files)
        texts = [*self.args, *(text for file in files for text in strings(file.content))]
        # a class that the table does not know may have any argument
        self.foreign = any(self._is_foreign(text.split("=", 1)[-1]) for text in texts)

    def run(self) -> None:
        """Check the files, then the arguments."""
        for before, arg in zip(("", *self.args), self.args, strict=False):
            if before in ("--config", "-c"):
                self._check_file(Path(arg))
        if self.foreign:
            return
        for arg in self.args:
            name = arg.split("=", 1)[0]
            if name.startswith("--"):
                self._check_argument(name.removeprefix("--").removesuffix("+"))

    def _is_foreign(self, text: str) -> bool:
        if not IMPORTED.fullmatch(text) or text.endswith((*FILES, ".ckpt", ".safetensors")):
            return False
        own = text.startswith("lit_prefopt.")
        return not own and text not in self.table.classes

    def _check_argument(self, name: str) -> None:
        heads = [head for head in self.options if name.startswith(f"{head}.")]
        if name in self.options or name == "help":
            return
        if not heads:
            if not any(head.startswith(name) for head in self.options):  # may be an abbreviation
                near = did_you_mean(name, self.options, _ALL).replace("mean ", "mean --")
                raise UsageError(f"--{name}: {near}")
            return
        head = max(heads, key=len)
        option, rest = self.options[head], name.removeprefix(f"{head}.")
        if not option.classes:
            if any(other.startswith(f"{head}.") for other in self.options):
                raise UsageError(self._unknown(f"--{head}.", rest, _below(head, self.options)))
            return
        named = self._named(option)
        taken = [self.table.arguments(path) for path in named]
        known = [arguments for arguments in taken if arguments is not None]
        if not named or len(known) < len(taken):
            return
        if not any(self._takes(arguments, rest) for arguments in known):
            names = {name for arguments in known for name in arguments}
            raise UsageError(self._unknown(f"--{head}.", rest, names, named))

    def _takes(self, arguments: Options, name: str) -> bool:
        """Whether an argument of a class may have this name; classes inside may be any."""
        name = name.removeprefix("init_args.")
        if name in arguments or name.split(".")[0] in SPEC:
            return True
        heads = [head for head in arguments if name.startswith(f"{head}.")]
        if not heads:
            return False
        head = max(heads, key=len)
        inner = [self.table.arguments(path) for path in arguments[head].classes]
        rest = name.removeprefix(f"{head}.")
        return not inner or any(one is None or self._takes(one, rest) for one in inner)

    def _unknown(self, before: str, name: str, known: set[str], classes: Sequence[str] = ()) -> str:
        name = name.removeprefix("init_args.")
        known = {one for one in known if not one.endswith((".help", "+"))}
        # the misspelt part may lie deeper: optimizer.lrr of optimizer.lr
        deeper = {f"{head}.{key}" for head, key in self._deeper(name, classes)}
        shown = ", ".join(sorted(known))
        near = did_you_mean(name, known | deeper, f"choose one of {shown}.")
        return f"{before}{name}: {near.replace('did you mean ', f'did you mean {before}', 1)}"

    def _deeper(self, name: str, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
        for path in classes:
            for head, option in (self.table.arguments(path) or {}).items():
                if name.startswith(f"{head}."):
                    for inner in self._named(option) or option.classes:
                        for key in self.table.arguments(inner) or {}:
                            yield head, key

    def _named(self, option: Option) -> list[str]:
        """Return the classes of an option that the recipe names."""
        return [path for path in option.classes if path.rsplit(".", 1)[-1] in self.words]

    def _check_file(self, path: Path) -> None:
        content = _read(path)
        if not isinstance(content, dict):
            return
        for key, value in content.items():
            name = str(key).removesuffix("+")
            if "." in name or name in self.table.commands:
                continue
            below = _below(name, self.options)
            if name not in self.options and not below:
                known = {option.split(".")[0] for option in self.options}
                raise UsageError(f"{path}: {name}: {did_you_mean(name, known)}")
            if name in self.options and self.options[name].classes:
                self._check_value(path, name, self.options[name], value)
            elif isinstance(value, dict) and below:
                self._check_group(path, name, value)

    def _check_group(self, path: Path, group: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            name = f"{group}.{str(key).removesuffix('+')}"
            if str(key) in SPEC or "." in str(key):
                continue
            if name not in self.options and not _below(name, self.options):
                known = _below(group, self.options)
                raise UsageError(f"{path}: {self._unknown(f'{group}.', str(key), known)}")
            if name in self.options:
                self._check_value(path, name, self.options[name], value)

    def _check_value(self, path: Path, key: str, option: Option, value: Any) -> None:
        """Check what a key holds that takes classes: one, a list of them, or a file with one."""
        if isinstance(value, str) and value.endswith(FILES) and option.pure:
            part = Path(value)
            if part.is_file():
                self._check_value(part, key, option, _read(part))
            return
        if isinstance(value, list):
            for one in value:
                self._check_value(path, key, option, one)
        if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
            return
        name = value["class_path"]
        short = [one for one in option.classes if name in (one, one.rsplit(".", 1)[-1])]
        if not short:
            if option.classes and "." not in name and not self.foreign:
                known = {one.rsplit(".", 1)[-1] for one in option.classes}
                raise UsageError(f"{path}: {key}: {name}: {did_you_mean(name, known)}")
            return
        arguments, given = self.table.arguments(short[0]), value.get("init_args")
        if arguments is None or not isinstance(given, dict):
            return
        for argument, inner in given.items():
            plain = str(argument).removesuffix("+")
            if not self._takes(arguments, plain) and not _below(plain, arguments):
                unknown = self._unknown(f"{key}.", plain, set(arguments))
                raise UsageError(f"{path}: {unknown}")
            if plain in arguments and arguments[plain].classes:
                self._check_value(path, f"{key}.{plain}", arguments[plain], inner)


_ALL = "there is no such key; `lit-prefopt fit --help` lists all."


def _below(head: str, options: Options) -> set[str]:
    return {name.removeprefix(f"{head}.") for name in options if name.startswith(f"{head}.")}


def _read(path: Path) -> Any:
    """Return what a recipe or a part holds, its own parts resolved; None where it is not YAML."""
    content = read_yaml(path)
    try:
        return resolve(content, path.resolve().parent, lambda text: yaml.load(text, LOADER))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # of a part that keys with dots change
        return None

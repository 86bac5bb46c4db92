"""Messages of the parser: one line that names what is wrong and the nearest right name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lit_prefopt.command_line.pages import options_of
from lit_prefopt.command_line.recording import class_page
from lit_prefopt.errors import did_you_mean, printable, quoted
from lit_prefopt.lazy import class_modules
from lit_prefopt.recipe_strings import FILES, RecipeFile

KEY = re.compile(r'Parser key "([^"]+)"')
HELP = re.compile(r"--([\w.]+\.help): ")
CLASS = re.compile(r"Problem with given class_path '([^']+)'")
UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^=\s]+)=")
NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)|path format: (\S+)")
EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
REQUIRED = re.compile(r"the following arguments are required: (.+)")
NO_OBJECT = re.compile(r"expects a function or a callable class: (.*)\. Got value")
GIVEN = re.compile(r"Given value: (?!NestedArg|Namespace)(.*)|val='(.*)'\)")
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def explain(message: str, parser: ArgumentParser, files: Sequence[RecipeFile] = ()) -> str:
    """Return a message of jsonargparse in one line.

    Args:
        message: The message, of many lines as a rule.
        parser: The parser that failed.
        files: Files of the recipe, among which the one with the error is looked for.
    """
    return printable(
        _explain_choice(message)
        or _explain_option(message, parser, files)
        or _explain_value(message, parser, files)
        or _explain_yaml(message, files)
        or " ".join(message.split())
    )


def _explain_choice(message: str) -> str | None:
    """Explain a command that does not exist."""
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", message)
    if choice is None:
        return None
    known = [name.strip(" '\"") for name in choice[2].split(",")]
    return f"{choice[1]}: {did_you_mean(choice[1], known)}"


def _explain_yaml(message: str, files: Sequence[RecipeFile]) -> str | None:
    """Explain a file that is not YAML."""
    if not message.startswith("Problems parsing config"):
        return None
    broken = [str(file.path) for file in files if file.content is None]
    place = re.search(r"line \d+, column \d+", message)
    where = f" near {place[0]}" if place else ""
    return f"{' or '.join(broken) or 'a recipe'}: this is no YAML{where}; correct it there."


def _explain_option(
    message: str, parser: ArgumentParser, files: Sequence[RecipeFile]
) -> str | None:
    """Explain a key that the command does not have, in the arguments or in a file."""
    known = _known_keys(parser)
    given = re.match(r"unrecognized arguments: --([^\s=]+)", message)
    if given:
        return f"--{given[1]}: {did_you_mean(given[1], known, _NO_KEY).replace('mean ', 'mean --')}"
    read = re.search(r"Subcommand '\w+' does not accept option '([^']+)'", message)
    return _explain_key(read[1], parser, files) if read else None


def _explain_key(name: str, parser: ArgumentParser, files: Sequence[RecipeFile]) -> str:
    """Explain a key of a file that the command does not have."""
    file = _file_with(files, name.split("."))
    return f"{file}{name}: {did_you_mean(name, _known_keys(parser), _NO_KEY)}"


def _explain_value(message: str, parser: ArgumentParser, files: Sequence[RecipeFile]) -> str | None:
    """Explain a value that a key cannot have: a class or its argument, a file, a wrong type."""
    keys, path, expected, value, depth = list[str](), "", list[str](), "", 0
    for line in message.splitlines():
        if found := HELP.match(line):
            keys.append(found[1])
        if found := KEY.search(line):
            keys.append(found[1])
        elif found := CLASS.search(line):
            path = found[1]
        elif (found := UNKNOWN.search(line)) and not path:  # a key of no class
            return _explain_key(found[1] or found[2], parser, files)
        elif found:
            return _explain_argument(keys, found[1] or found[2], path, parser, message, files)
        elif found := NO_CLASS.search(line):
            return _explain_class(keys, found[1] or found[2], message, files)
        elif found := REQUIRED.search(line):
            names = [".".join([*keys, name.strip()]) for name in found[1].split(",")]
            return f"--{', --'.join(names)}: {_short(path)} has no default; give a value."
        elif found := NO_OBJECT.search(line):
            return f"--{'.'.join(keys)}: {found[1]}."
        elif found := EXPECTED.search(line):
            depth = depth or found.start()
            if found.start() >= depth:  # less is an alternative of a key around this one
                expected.append(found[1])
            value = found[2] or value
        elif found := GIVEN.search(line):
            value = value or found[1] or found[2]
            break
    if not keys or not expected:
        return None
    key = ".".join(keys)
    types = list(dict.fromkeys(map(_type, expected)))
    where = _place(key, message, files, keys[-1].split("."), value)
    return f"{where}: {quoted(value)} is given, but expected is {' or '.join(types)}."


def _explain_argument(
    keys: list[str],
    name: str,
    path: str,
    parser: ArgumentParser,
    message: str,
    files: Sequence[RecipeFile],
) -> str:
    """Explain an argument that a class does not have."""
    module, kind = path.rsplit(".", 1)
    page = class_page(getattr(importlib.import_module(module), kind), type(parser))
    known = [one for one in options_of(page, "x.") if not one.endswith(".help")]
    near = did_you_mean(name, known, f"{kind} takes {', '.join(sorted(known)) or 'no arguments'}.")
    if not near.startswith("did"):  # the key may be right behind its first part
        near = did_you_mean(name.split(".")[0], known, near)
    key = ".".join(keys)
    where = _place(f"{key}.{name}", message, files, name.split("."))
    dashes = "--" if where.startswith("--") else ""
    return f"{where}: {near.replace('did you mean ', f'did you mean {dashes}{key}.')}"


def _explain_class(keys: list[str], name: str, message: str, files: Sequence[RecipeFile]) -> str:
    """Explain the name of a class or file that does not exist."""
    where = _place(".".join(keys), message, files, [], name)
    if name.endswith(FILES) or "/" in name:
        return f"{where}: there is no file {name}."
    otherwise = "give the whole path of a class, such as my_package.MyClass."
    return f"{where}: there is no class {name}; {did_you_mean(name, class_modules(), otherwise)}"


def _place(
    key: str, message: str, files: Sequence[RecipeFile], names: Sequence[str], value: Any = None
) -> str:
    """Return the key as an argument, or with its file where a file holds it."""
    file = "" if "NestedArg" in message else _file_with(files, names, value)
    return f"{file}{key}" if file else f"--{key}"


def _file_with(files: Sequence[RecipeFile], names: Sequence[str], value: Any = None) -> str:
    """Return the last file that holds a key, or a value, as the beginning of a message."""
    name = names[-1] if names else None
    for file in reversed(files):
        if _holds(file.content, name, value):
            return f"{file.path}: "
    return ""


def _holds(content: Any, name: str | None, value: Any) -> bool:
    if isinstance(content, list):
        return any(_holds(one, name, value) for one in content)
    if not isinstance(content, dict):
        return name is None and str(content) == str(value)
    for key, inner in content.items():
        named = name is None or str(key).removesuffix("+") == name
        if named and (value is None or str(inner) == str(value)):
            return True
    return any(_holds(inner, name, value) for inner in content.values())


def _known_keys(parser: ArgumentParser) -> list[str]:
    """Return the keys of a parser and of its commands."""
    return [
        name.removeprefix("--")
        for name in _options(parser)
        if name.startswith("--") and not name.endswith((".help", "+"))
    ]


def _options(parser: ArgumentParser) -> Iterable[str]:
    """Yield the options of a parser and of its commands."""
    yield from parser._option_string_actions
    commands = parser._subcommands_action
    for inner in (commands._name_parser_map if commands else {}).values():
        yield from _options(inner)


def _type(text: str) -> str:
    """Return the name of a type in words."""
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    if literal:
        return f"one of {literal[1]}".replace("'", "")
    plain = re.sub(r"<class '(.*)'>", r"\1", text)
    return "null" if plain == "NoneType" else TYPES.get(plain, plain)


def _short(path: str) -> str:
    return path.rsplit(".", 1)[-1]


_NO_KEY = "there is no such key; `--help` lists all."

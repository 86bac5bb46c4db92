"""Pages that the site generates: home page, recipes, Python API, and files linked outside docs/.

Links in Markdown are relative to the repository, so that they work on GitHub as well. A file
outside docs/ that a page links to is copied into the site at the same path, and the link adapted.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = "lit_prefopt"
LINK = re.compile(r"(\]\()([^()\s]+?)(#[^()\s]*)?(\))")
COMMAND = re.compile(r"lit-prefopt [a-z]+ (?:[^`\n]*\\\n)*[^`\n]*")
SCHEME = re.compile(r"^([a-z]+:|#)")
COMMANDS = {
    "fit": ("recipes", "Training recipes"),
    "predict": ("generate", "Generating and caching recipes"),
    "rounds": ("rounds", "Recipes of several rounds"),
    "evaluate": ("evaluate", "Evaluation recipes"),
}
PARTS = {"backbone": "Backbones", "judge": "Judges", "hardware": "Hardware"}


# Where a page of the site lies in the repository, and back ----------------------------------------


def repository_path(page: str) -> str:
    """Return the path in the repository of a page's source."""
    if page == "index.md":
        return "README.md"
    inside = f"docs/{page}"
    return inside if page.startswith("reference/") or (ROOT / inside).exists() else page


def site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def linked(text: str, page: str) -> Iterator[str]:
    """Return the repository paths of the files that a page links to."""
    base = posixpath.dirname(repository_path(page))
    for line in outside_fences(text):
        for match in LINK.finditer(line):
            if not SCHEME.match(match[2]):
                yield posixpath.normpath(posixpath.join(base, match[2]))


def outside_fences(text: str) -> Iterator[str]:
    """Return the lines of a page that are not code."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield line


def adapt_links(text: str, page: str) -> str:
    """Return a page whose relative links lead to files of the site."""
    base, here = posixpath.dirname(repository_path(page)), posixpath.dirname(page)

    def adapt(match: re.Match[str]) -> str:
        if SCHEME.match(match[2]):
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(base, match[2])))
        return f"{match[1]}{posixpath.relpath(target, here or '.')}{match[3] or ''}{match[4]}"

    fenced, lines = False, []
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        lines.append(line if fenced or fence else LINK.sub(adapt, line))
    return "\n".join(lines)


# Generated pages ----------------------------------------------------------------------------------


def head(path: Path) -> list[str]:
    """Return the lines of the comment at the head of a YAML file."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def summary(path: Path) -> str:
    """Return the first line of a YAML file's head, without the command that follows it."""
    first = (head(path) or [path.stem])[0]
    text = re.split(r":? *`?(?:lit-prefopt |[a-z]+: \.\.)", first)[0].rstrip(": ")
    return text.replace("|", "\\|").replace("<", "&lt;")


def head_commands(path: Path) -> list[str]:
    """Return the commands that the head of a YAML file quotes, in its order."""
    return COMMAND.findall("\n".join(head(path)))


def yaml_page(path: Path, title: str) -> str:
    """Return the page of a YAML file: what it is, its commands, and the whole file."""
    name = path.relative_to(ROOT).as_posix()
    parts = [f"# {title}", summary(path)]
    if commands := head_commands(path):
        parts.append("\n".join(["```", *commands, "```"]))
    parts.append(f'```yaml title="{name}"\n{path.read_text()}```\n')
    return "\n\n".join(parts)


def recipe_pages() -> dict[str, str]:
    """Return the pages of all shipped recipes and parts, by path in the site."""
    pages: dict[str, str] = {}
    lines = [
        "# Recipes",
        "",
        "Generated from the YAML files that the package ships: [how they are written]",
    ]
    lines[-1] += "(../../../configs/README.md)."
    lines.append("")
    for command, (folder, title) in COMMANDS.items():
        lines += [f"## {title}", "", f"`lit-prefopt {command} --config NAME`", ""]
        lines += ["| name | |", "|---|---|"]
        paths = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        if command == "fit":
            first = ("quickstart", "quickstart-flow")
            paths = [*(ROOT / "configs" / f"{name}.yaml" for name in first), *paths]
        for path in paths:
            page = f"reference/recipes/{command}/{path.stem}.md"
            pages[page] = yaml_page(path, path.stem)
            lines.append(f"| [{path.stem}]({command}/{path.stem}.md) | {summary(path)} |")
        lines.append("")
    for folder, title in PARTS.items():
        paths = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        lines += [f"## {title}", "", "| file | |", "|---|---|"] if paths else []
        for path in paths:
            page = f"reference/recipes/{folder}/{path.stem}.md"
            pages[page] = yaml_page(path, f"{folder}/{path.name}")
            lines.append(f"| [{folder}/{path.name}]({folder}/{path.stem}.md) | {summary(path)} |")
        lines.append("")
    base = ROOT / "configs" / "base.yaml"
    lines += ["## What every run shares", "", f'```yaml title="base.yaml"\n{base.read_text()}```']
    return {"reference/recipes/index.md": "\n".join(lines) + "\n", **pages}


def api_pages() -> dict[str, str]:
    """Return one page for each package, by path in the site; its modules are its sections."""
    pages: dict[str, str] = {}
    lines = ["# Python API", "", "Generated from the docstrings.", "", "| package | |", "|---|---|"]
    for init in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        folder = init.parent
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = [m for m in sorted(folder.glob("*.py")) if not m.name.startswith("_")]
        text = init.read_text()
        guide = folder / "README.md"
        if not (modules or text or guide.exists()):
            continue
        first = re.match(r'"""(.+?)(\n|"""|$)', text)
        about = first[1] if first else ""
        body = [f"# {name}", "", about, ""]
        if guide.exists():
            up = posixpath.relpath(folder.relative_to(ROOT).as_posix(), "docs/reference/api")
            body += [f"[How this package works]({up}/README.md)", ""]
        body += [f"::: {name}.{module.stem}\n" for module in modules]
        pages[f"reference/api/{name}.md"] = "\n".join(body) + "\n"
        lines.append(f"| [{name}]({name}.md) | {about.replace('|', '')} |")
    return {"reference/api/index.md": "\n".join(lines) + "\n", **pages}


# What MkDocs calls --------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    index, *packages = api_pages()
    api = [index, *({Path(page).stem: page} for page in packages)]
    reference = [{"Recipes": list(recipe_pages())}, {"Python API": api}]
    assert config.nav is not None
    config.nav += [{"Reference": reference}, "CONTRIBUTING.md", "CHANGELOG.md"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and all files of the repository that pages link to."""

    def add(page: str, text: str | None = None, nav: bool = True) -> None:
        level = InclusionLevel.INCLUDED if nav else InclusionLevel.NOT_IN_NAV
        if text is None:
            path = str(ROOT / repository_path(page))
            files.append(File.generated(config, page, abs_src_path=path, inclusion=level))
        else:
            files.append(File.generated(config, page, content=text, inclusion=level))

    for page, text in {**recipe_pages(), **api_pages()}.items():
        add(page, text)
    for page in ("index.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        add(page)
    pending = [file for file in files if file.src_uri.endswith(".md")]
    while pending:
        page = pending.pop()
        for path in linked(page.content_string, page.src_uri):
            target = site_path(path)
            if files.get_file_from_path(target) is None and (ROOT / path).is_file():
                add(target, nav=False)
                file = files.get_file_from_path(target)
                assert file is not None
                pending += [file] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links of a page to the site."""
    return adapt_links(markdown, page.file.src_uri)

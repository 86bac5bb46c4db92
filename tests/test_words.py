"""One word per thing: no name is defined twice, and none is of the old vocabulary."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_prefopt"

TWINS = {
    "__init__.py": "every folder has one",
    "base.py": "the base class of a folder's family",
    "chroma.py": "names of a family's parts, and its backbone",
    "clip.py": "the CLIP judges, and the toy world's CLIP",
    "flux1.py": "names of a family's parts, and its backbone",
    "guidance.py": "the families' conventions of guidance, and guided predictions",
    "judge.py": "the base class of judges, and the toy world's judge",
    "lumina2.py": "names of a family's parts, and its backbone",
    "pairs.py": "the data module of pairs, and the toy world's pairs",
    "qwen_image.py": "names of a family's parts, and its backbone",
    "stable_diffusion.py": "names of a family's parts, and its backbone; as the next two",
    "stable_diffusion_3.py": "names of a family's parts, and its backbone",
    "stable_diffusion_xl.py": "names of a family's parts, and its backbone",
    "vae.py": "the VAE's part of a backbone, and the toy world's VAE",
    "z_image.py": "names of a family's parts, and its backbone",
}
"""Files that may share a name, with the reason."""

OLD = {
    "ask": "request",
    "asked": "requests",
    "carried": "batch",
    "coarse": "bf16, quantized, rounded",
    "coin": "chance_95",
    "coins": "AugmentDraws",
    "course": "EpochProgress",
    "evidence": "results",
    "facts": "settings, metadata, summary",
    "foretold": "estimated",
    "handful": "MAX_NAMED",
    "hasten": "apply_memory_format_and_compile",
    "heed": "ignore_interrupts",
    "intake": "prepare",
    "precise": "upcast_vae_if_needed",
    "questions": "EvaluationPlan",
    "room": "buffer, shared_memory",
    "said": "what it is: message, description, prediction",
    "say": "score_images",
    "says": "contains",
    "sent": "to_device",
    "spare": "chosen_protection",
    "speak": "sample",
    "speaker": "image_sampler",
    "speaks": "the active network",
    "steer": "extra_conditioning",
    "tally": "BrokenSamples",
    "taught": "teacher_step, consistency_points",
    "teaching": "consistency_targets",
    "tell": "log_, warn_, print_",
    "tells": "log_, warn_, print_",
    "told": "denoiser_kwargs, summary, values",
    "visit": "SampleRef",
    "walk": "rollout",
}
"""Words of no identifier, and what is written instead."""

OLD_NAMES = {
    "Anchor": "ResumePoint",
    "Answer": "SampleResult",
    "HeldOut": "PreferenceMetric",
    "Means": "NamedMeans",
    "Panel": "Scorers",
    "Stage": "EpochPosition",
    "Window": "RunningMeans",
}
"""Names of no class, and what they are called instead; as parts of other names they are good."""


def files() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the files of the package with their syntax trees."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def words(name: str) -> set[str]:
    """Return the words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield all names that a file defines, with their lines."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name, node.lineno


def old_words(path: Path, tree: ast.AST) -> list[str]:
    """Return the old words in a file's identifiers and in its path."""
    found = [(path.with_suffix("").as_posix(), 1), *identifiers(tree)]
    return [
        f"{path}:{line}: {name}: {word} is now {OLD[word]}"
        for name, line in found
        for word in sorted(words(name) & OLD.keys())
    ]


def classes(tree: ast.AST) -> list[str]:
    """Return the names of a file's classes."""
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_no_class_name_is_defined_twice() -> None:
    """A reader who searches for a class finds one."""
    homes = defaultdict(list)
    for path, tree in files():
        for name in classes(tree):
            homes[name].append(str(path))
    assert len(homes) > 150
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_file_name_is_used_twice() -> None:
    """But for twins, each of which has its reason and is really there twice."""
    homes = defaultdict(list)
    for path, _ in files():
        homes[path.name].append(str(path))
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in TWINS} == {}
    assert TWINS.keys() <= twice.keys()


def test_no_identifier_is_of_the_old_vocabulary() -> None:
    """Files, classes, functions, parameters, attributes and variables."""
    assert [line for path, tree in files() for line in old_words(path, tree)] == []
    named = {name for _, tree in files() for name in classes(tree)}
    assert named & OLD_NAMES.keys() == set()


@pytest.mark.parametrize(
    "code",
    ["class Told: ...", "def tell_all(): ...", "def f(asked=0): ...", "a.facts = 1", "said = 1"],
)
def test_an_old_word_is_found(code: str) -> None:
    """In every kind of definition, and in the path; a longer word that holds it is another."""
    assert old_words(Path("a.py"), ast.parse(code))
    assert old_words(Path("teaching/a.py"), ast.parse("")) != []
    assert old_words(Path("a.py"), ast.parse("satellite = foretells = walked = 1")) == []

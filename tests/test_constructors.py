"""Options of a base class reach every subclass's help, each with its docstring."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
from jsonargparse import ArgumentParser
from lightning import LightningDataModule

import lit_prefopt
from lit_prefopt.backbones import Backbone
from lit_prefopt.cli import main
from lit_prefopt.learner import Learner
from lit_prefopt.optimizers import OptimizerConfig

ROOTS = (Learner, Backbone, LightningDataModule, OptimizerConfig)

FIXED = {
    "ConsistencyDPO": {"chosen_protection", "gamma", "gamma_steps", "weighting"},
    "CurriculumPairs": {"shards", "aspect_buckets", "bucket_step", "min_side"},
    "D3PO": {"delta", "gamma", "kept", "sides"},
    "DiffusionKTO": {"anchor", "chosen_protection"},
    "Flux2Klein": {"policy", "process"},
    "QwenImage": {"policy", "process"},
    "RankDPO": {"chosen_protection"},
    "StableDiffusion": {"policy", "process"},
    "StableDiffusion3": {"without"},
    "StableDiffusionXL": {"policy", "process"},
    "TransformerBackbone": {"process"},
    "LatentBackbone": {"policy"},
    "UNetBackbone": {"policy", "process", "without"},
    "ToyFlow": {"t5", "text_tokens"},
    "ToyCollections": {"prompts", "validation", "resolution"},
    "ToyConsistency": {"teacher"},
    "ToyDiffusion": {"pretrained"},
    "ToyPairGroups": {"shards"},
    "ToyPairs": {"validation", "resolution", "flip"},
    "ToySampleGroups": {"shards"},
    "ToyStages": {"validation", "resolution", "flip"},
}
"""Options of a base class that a subclass sets itself."""

for module in pkgutil.walk_packages(lit_prefopt.__path__, "lit_prefopt."):
    importlib.import_module(module.name)


def subclasses(root: type) -> Iterator[type]:
    """Yield the package's classes below a root, the root included."""
    if root.__module__.startswith("lit_prefopt."):
        yield root
    for child in root.__subclasses__():
        if child.__module__.startswith("lit_prefopt."):
            yield from subclasses(child)


CLASSES = sorted({one for root in ROOTS for one in subclasses(root)}, key=lambda one: one.__name__)


def options(kind: type) -> dict[str, str]:
    """Return the help of the options of a class by name, as the command line finds them."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "x")
    found = {action.dest: action.help for action in parser._actions}
    return {
        name.removeprefix("x."): text
        for name, text in found.items()
        if name.startswith("x.") and not name.endswith(".help")
    }


HELP = {kind: options(kind) for kind in CLASSES}


def test_all_families_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"D3PO", "StepAwarePreference", "ToyConsistency", "CachedPairs", "Lion8bit"} <= names


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_options_of_bases_reach_the_help(kind: type) -> None:
    own = HELP[kind]
    assert [name for name, text in own.items() if not text] == []
    for base in kind.__mro__[1:]:
        if base not in HELP:
            continue
        fixed = {
            name
            for one in kind.__mro__
            if issubclass(one, base)
            for name in FIXED.get(one.__name__, ())
        }
        assert HELP[base].keys() - own.keys() == fixed & HELP[base].keys(), base


def test_the_table_of_fixed_options_names_classes() -> None:
    assert FIXED.keys() <= {kind.__name__ for kind in CLASSES}


def test_the_command_line_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.help", "D3PO"])
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "Ratios are clipped to [1 - eps, 1 + eps], step by step.",
        "Precision of the stored states",
        "Scores decoded images or, if it is step-aware",
        "they are the same at every validation.",
        "Optimizer and learning-rate schedule of the trained weights.",
    ):
        assert sentence in text


def test_abstract_members_of_a_backbone_are_those_of_its_docstring() -> None:
    listed = re.search(r"seven members:\n\n(.*?)\n\n", Backbone.__doc__ or "", re.DOTALL)
    assert listed
    named = " ".join(line.partition(": ")[0] for line in listed[1].splitlines())
    assert set(re.findall(r"`(\w+)", named)) == Backbone.__abstractmethods__
    assert len(Backbone.__abstractmethods__) == 7

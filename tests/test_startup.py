"""What a command imports: names are lazy, and a run imports what its recipe names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lit_prefopt
from lit_prefopt.command_line.table import load_table
from lit_prefopt.configs import BASE, PREDICT
from lit_prefopt.lazy import class_modules, imported_names
from lit_prefopt.recipe_files import named_recipes
from lit_prefopt.recipe_strings import read_recipe, words

PACKAGES = ["backbones", "callbacks", "datamodules", "export", "generate", "judges", "methods"]
PACKAGES += ["optimizers", "strategies", "toy"]


@pytest.mark.parametrize("name", ["", *PACKAGES])
def test_every_exported_name_is_there(name: str) -> None:
    package = importlib.import_module(f"lit_prefopt.{name}" if name else "lit_prefopt")
    for exported in package.__all__:
        assert getattr(package, exported) is not None
        assert exported in dir(package)
    lazy = set(imported_names(Path(package.__file__)))
    assert lazy <= set(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018 - the access is what is tested


def test_what_an_author_of_a_method_needs() -> None:
    names = (
        "PreferenceDiffusionModule OnPolicyModule Backbone Judge Pairs LogRatios load InputError"
    )
    assert {*names.split(), "__version__"} == set(lit_prefopt.__all__)


def test_classes_are_found_without_imports() -> None:
    homes = class_modules()
    assert homes["DiffusionDPO"] == ["lit_prefopt.methods.diffusion_dpo"]
    assert homes["PickScore"] == ["lit_prefopt.judges.clip"]


def test_the_classes_that_a_recipe_names() -> None:
    args = named_recipes(["fit", "--config", "toy-diffusion-dpo", "--model.optimizer", "Lion8bit"])
    named = words(args, read_recipe(args, [BASE, PREDICT])) & set(class_modules())
    assert {"DiffusionDPO", "ToyDiffusion", "ToyPairs", "Checkpoints", "Lion8bit"} <= named
    assert not {"PickScore", "HPSv2", "SPO", "SDXL", "StableDiffusionXL"} & named


def imported(*args: str) -> set[str]:
    """Return the modules that a command imports."""
    program = (
        "import sys; from lit_prefopt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "args",
    [
        ["shards", "--help"],
        *(["shards", name, "--help"] for name in ("convert", "validate", "preview", "stages")),
        ["export", "--help"],
        ["rounds", "--help"],
        ["report", "--help"],
    ],
    ids=" ".join,
)
def test_commands_on_files_answer_without_torch(args: list[str]) -> None:
    heavy = {"torch", "lightning", "transformers", "diffusers", "matplotlib", "torchmetrics"}
    assert not heavy & imported(*args)


@pytest.mark.slow
def test_the_first_help_page_is_kept_with_those_of_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "lit_prefopt.cli", "fit", "--help"]
    cold, warm = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert cold.returncode == warm.returncode == 0, cold.stderr
    assert cold.stdout == warm.stdout
    assert "--trainer.max_steps" in warm.stdout
    assert [cold.stderr.count("\n"), warm.stderr] == [1, ""]
    table = load_table()
    assert table is not None
    paths = {
        path
        for key in ("model", "backbone", "data", "trainer.callbacks", "trainer.strategy")
        for path in table.options("fit")[key].classes
        if path.startswith("lit_prefopt.")
    }
    without = {path for path in paths if table.arguments(path) is None}
    assert {path.rsplit(".", 1)[-1] for path in without} == {"RunDirectory"}


@pytest.mark.slow
def test_a_fit_imports_what_its_recipe_names() -> None:
    modules = imported("fit", "--config", "toy-diffusion-dpo", "--print_config")
    assert {"lit_prefopt.methods.diffusion_dpo", "lit_prefopt.toy.backbone"} <= modules
    ours = {name for name in modules if name.startswith("lit_prefopt.")}
    assert not {
        name for name in ours if name.startswith(("lit_prefopt.judges.", "lit_prefopt.gen"))
    }
    assert not {name for name in modules if name.startswith("bitsandbytes.")}

"""Every shipped recipe: it parses, has its head, and states all of its method's numbers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_prefopt import judges, methods, toy
from lit_prefopt.cli import main
from lit_prefopt.configs import CONFIGS, find_config, recipe_names

RECIPES = recipe_names()
TOY = [f"configs/toy/{name}.yaml" for name in ("vae", "clip", "unet", "flow", "lcm", "diptych")]
OTHERS = ["quickstart", "quickstart-flow", *TOY]
GENERAL = [
    "Checkpoints",
    "LearningRateMonitor",
    "ExportWeights",
    "SampleGrid",
]
ADDED = {
    "quickstart": ["Evaluation"],
    "quickstart-flow": ["Evaluation"],
    "configs/toy/flow.yaml": ["PolicyAveraging"],
    "configs/toy/unet.yaml": ["PolicyAveraging"],
    "configs/toy/diptych.yaml": ["PolicyAveraging"],
    "configs/toy/lcm.yaml": ["PolicyAveraging"],
}
MAX_STEPS = {
    "quickstart": 120,
    "quickstart-flow": 120,
    "toy-flow-diffusion-dpo": 120,
    "toy-flow-sft": 120,
    "toy-flow-spin": 40,
    "toy-flow-spo": 72,
    "toy-flow-dense-reward": 120,
    "toy-flow-d3po": 120,
    "toy-flow-grpo": 30,
    "toy-flow-nft": 60,
    "toy-ddpo": 30,
    "sd15-ddpo": 400,
    "sd35-flow-grpo": 4000,
    "sd35-nft": 1000,
    "toy-flow-curriculum-dpo": 120,
    "toy-flow-di3po": 120,
    "toy-kto": 120,
    "toy-npo": 120,
    "toy-flow-npo": 120,
    "sd15-npo": 5000,
    "toy-flow-pnapo": 120,
    "sd35-pnapo": 500,
    "toy-rank-dpo": 120,
    "toy-flow-rank-dpo": 120,
    "sdxl-rank-dpo": 400,
    "toy-flow-kto": 120,
    "sd15-kto": 20000,
    "toy-flow-step-aware-preference": 150,
    "configs/toy/flow.yaml": 4800,
    "toy-diffusion-dpo": 120,
    "toy-sft": 120,
    "toy-spin": 40,
    "sd15-spin": 500,
    "toy-spo": 72,
    "toy-dense-reward": 120,
    "toy-d3po": 120,
    "toy-curriculum-dpo": 120,
    "sd15-curriculum-dpo": 10000,
    "sdxl-curriculum-dpo": 10000,
    "sd15-dense-reward": 40000,
    "sd15-dense-reward-single": 10000,
    "sd15-diffusion-dpo": 2000,
    "sd15-sft": 2000,
    "sdxl-diffusion-dpo": 2000,
    "sdxl-sft": 2000,
    "sd15-spo": 8000,
    "sdxl-spo": 20000,
    "sd35-diffusion-dpo": 500,
    "sd35-sft": 500,
    "sd35-spo": 3000,
    "flux1-diffusion-dpo": 500,
    "flux1-sft": 500,
    "flux2-klein-diffusion-dpo": 500,
    "flux2-klein-sft": 500,
    "flux2-klein-spo": 2000,
    "lumina2-diffusion-dpo": 500,
    "lumina2-sft": 500,
    "qwen-image-diffusion-dpo": 300,
    "qwen-image-sft": 500,
    "z-image-diffusion-dpo": 500,
    "z-image-sft": 500,
    "chroma-diffusion-dpo": 500,
    "chroma-sft": 500,
    "toy-step-aware-preference": 150,
    "sd15-step-aware-preference": 8000,
    "sdxl-step-aware-preference": 7000,
    "toy-di3po": 120,
    "sdxl-di3po": 900,
    "toy-mapo": 120,
    "toy-flow-mapo": 120,
    "toy-dspo": 120,
    "toy-flow-dspo": 120,
    "toy-capo": 120,
    "toy-flow-capo": 120,
    "toy-inpo": 120,
    "toy-flow-inpo": 120,
    "toy-smpo": 120,
    "toy-flow-smpo": 120,
    "sdxl-mapo": 2000,
    "sd15-dspo": 1500,
    "sd15-inpo": 400,
    "sd15-smpo": 200,
    "toy-lcm-curriculum-dpo": 120,
    "sd15-lcm-curriculum-dpo": 10000,
    "configs/toy/lcm.yaml": 800,
    "configs/toy/unet.yaml": 2400,
    "configs/toy/diptych.yaml": 2000,
    "configs/toy/vae.yaml": -1,
    "configs/toy/clip.yaml": -1,
}


def resolved(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The recipe as the command line understands it."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", RECIPES + OTHERS)
def test_recipe_parses_to_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(name, capsys)
    callbacks = [entry["class_path"].split(".")[-1] for entry in config["trainer"]["callbacks"]]
    assert callbacks == GENERAL + ADDED.get(name, [])
    assert config["trainer"]["max_steps"] == MAX_STEPS[name]
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["weights_only"] is True
    stated = yaml.safe_load(find_config(name).read_text())
    if "batch" in stated:  # a later layer that changes `class_path` keeps the earlier one's numbers
        arguments = set(config["model"]["init_args"])
        # neither is a number: the first changes none, the second is off where it is not stated
        assert set(stated["model"]["init_args"]) >= arguments - {"check_base", "swapped"}
        assert set(stated["model"]["init_args"]) <= arguments
        assert config["batch"] == stated["batch"]
        assert config["batch"]["pairs"] % config["data"]["init_args"]["batch_size"] == 0


ARXIV = re.compile(r"arXiv \d{4}\.\d{5}")
SECTIONS = ["backbone", "model", "data", "batch", "trainer"]


@pytest.mark.parametrize("name", [*RECIPES, "quickstart", "quickstart-flow"])
def test_a_recipe_is_one_file_with_a_head(name: str) -> None:
    """Paper and command at the head, then the same sections in the same order."""
    text = find_config(name).read_text()
    head = "".join(re.findall(r"^#.*\n", text[: text.index("\nbackbone")], re.MULTILINE))
    assert ARXIV.search(head)
    assert f"\n#     lit-prefopt fit --config {name}" in head
    stated = yaml.safe_load(text)
    sections = [key for key in stated if not key.startswith("backbone.")]
    assert sections == SECTIONS
    assert list(stated["batch"]) == ["pairs", "validate_every"]
    for section in ("model", "data"):  # written out, not another file
        assert set(stated[section]) == {"class_path", "init_args"}
    assert len(text.splitlines()) <= 75


def test_there_are_few_files() -> None:
    assert len([*CONFIGS.rglob("*.yaml")]) <= 200


@pytest.mark.parametrize("name", recipe_names("generate"))
def test_recipe_of_a_generation_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", name, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["return_predictions"] is False
    assert config["trainer"]["callbacks"] == []
    assert config["backbone"]["init_args"]["reference"] in ("none", "initial")


@pytest.mark.parametrize(
    "name",
    [
        *("toy", "sd15", "sdxl", "sd35", "flux1", "flux2-klein", "qwen-image", "z-image", "chroma"),
        "lumina2",
    ],
)
def test_a_recipe_learns_from_a_cache(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a recipe says of its pairs holds for the cached ones."""
    cache = ["--data", "CachedPairs", "--data.shards", "runs/cache", "--backbone.encoders", "false"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", f"{name}-diffusion-dpo", *cache, "--print_config"])
    assert stop.value.code == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    stated = yaml.safe_load(find_config(f"{name}-diffusion-dpo").read_text())["data"]["init_args"]
    assert data["class_path"].endswith(".CachedPairs")
    assert data["init_args"]["shards"] == "runs/cache"
    for key in ("batch_size", "caption_dropout", "workers"):
        assert data["init_args"][key] == stated[key]
    assert data["init_args"]["workers"] == (0 if name == "toy" else 4)


@pytest.mark.parametrize("name", recipe_names("evaluate"))
def test_recipe_of_an_evaluation_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--config", name, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].endswith(".ModelComparison")
    assert config["trainer"]["callbacks"] == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "judge").glob("*.yaml")), ids=lambda p: p.stem)
def test_judge_files_state_all_numbers(path: Path) -> None:
    stated = yaml.safe_load(path.read_text())
    cls = getattr(judges, stated["class_path"])
    assert set(stated["init_args"]) == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_classes_that_recipes_name_explain_every_argument() -> None:
    named = [getattr(methods, name) for name in methods.__all__]
    for cls in [*named, judges.StepAwarePreference]:
        documented = "".join(inspect.getdoc(c) or "" for c in cls.__mro__)
        for argument in set(inspect.signature(cls).parameters) - {"args", "kwargs"}:
            assert f"{argument}:" in documented, (cls, argument)
    for name in toy.__all__:
        cls = getattr(toy, name)
        for argument in set(inspect.signature(cls).parameters) - {"args", "kwargs"}:
            assert f"{argument}:" in (inspect.getdoc(cls) or ""), (name, argument)

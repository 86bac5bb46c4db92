"""Recipes of one's own: shipped parts by name, overrides, and modules beside the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_prefopt.cli import main
from lit_prefopt.commands.estimate import estimate
from lit_prefopt.configs import CONFIGS
from lit_prefopt.errors import InputError
from lit_prefopt.recipe_files import find_part, named_recipes, resolve, shipped_parts
from tests.helpers.runs import TWO_RANKS, finished, launch

METHOD = """
from lit_prefopt.methods import DiffusionDPO


class {name}(DiffusionDPO):
    '''A method of one's own.'''
"""


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test searches for modules where the others did not."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what the command line makes of a command."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0, (stop.value.code, capsys.readouterr().err)
    return yaml.safe_load(capsys.readouterr().out)


def own_recipe(folder: Path, name: str, text: str) -> str:
    """Write a recipe and, beside it, the module `name` with a method of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(METHOD.format(name=name.title()))
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


MINE = """
backbone: backbone/sd15-lora.yaml
backbone.lora.rank: 64
backbone.reference: none
model:
  class_path: SPO
  init_args:
    judge: judge/pickscore.yaml
    optimizer: AdamW
model.judge.batch_size: 3
model.optimizer.lr: 0.5
data: {class_path: PairShards, init_args: {shards: x, batch_size: 2, resolution: 64}}
trainer: hardware/zero2.yaml
trainer.max_steps: 77
trainer.callbacks+:
  - class_path: Guard
"""


def test_shipped_parts_in_a_recipe_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = resolved(capsys, "fit", "--config", str(tmp_path / "mine.yaml"))
    backbone = config["backbone"]["init_args"]
    assert backbone["pretrained"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (backbone["lora"]["rank"], backbone["reference"]) == (64, "none")
    assert backbone["dtype"] == "bfloat16"
    model = config["model"]["init_args"]
    assert model["judge"]["class_path"].endswith(".PickScore")
    assert model["judge"]["init_args"]["batch_size"] == 3
    assert model["judge"]["init_args"]["pretrained"] == "yuvalkirstain/PickScore_v1"
    assert model["optimizer"]["init_args"]["lr"] == 0.5
    trainer = config["trainer"]
    assert trainer["strategy"]["init_args"]["stage"] == 2
    assert trainer["max_steps"] == 77
    callbacks = [entry["class_path"].split(".")[-1] for entry in trainer["callbacks"]]
    assert callbacks[-2:] == ["SampleGrid", "Guard"]  # after those of every run
    assert len(callbacks) == 5


def test_shipped_parts_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--trainer.callbacks+", "Evaluation", "--trainer.callbacks.prompts", "ToyPrompts"]
    common += ["--trainer.callbacks.judge=judge/clip-score.yaml", "--trainer=hardware/ddp.yaml"]
    config = resolved(capsys, "fit", "--config", "toy-diffusion-dpo", *common)
    [evaluation] = [c for c in config["trainer"]["callbacks"] if "Evaluation" in c["class_path"]]
    assert evaluation["init_args"]["judge"]["class_path"].endswith(".CLIPScore")
    assert config["trainer"]["strategy"]["class_path"].endswith(".DDPStrategy")
    assert config["trainer"]["max_steps"] == 120


def test_a_file_beside_the_recipe_wins_over_a_shipped_name(tmp_path: Path) -> None:
    shipped = find_part("backbone", "backbone/sdxl.yaml", tmp_path)
    assert shipped == CONFIGS / "backbone" / "sdxl.yaml"
    (tmp_path / "backbone").mkdir()
    own = tmp_path / "backbone" / "sdxl.yaml"
    own.write_text("class_path: Mine")
    assert find_part("backbone", "backbone/sdxl.yaml", tmp_path) == own
    spec = resolve({"backbone": "backbone/sdxl.yaml", "backbone.lora.rank": 4}, tmp_path)
    assert spec == {"backbone": {"class_path": "Mine", "init_args": {"lora": {"rank": 4}}}}


def test_parts_of_parts_start_from_their_own_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "judge.yaml").write_text("class_path: Own")
    (tmp_path / "parts" / "model.yaml").write_text(
        "class_path: SPO\ninit_args: {judge: judge.yaml, beta: 1}"
    )
    spec = resolve({"model": "parts/model.yaml", "model.judge.scale": 2}, tmp_path)
    judge = {"class_path": "Own", "init_args": {"scale": 2}}
    assert spec == {"model": {"class_path": "SPO", "init_args": {"judge": judge, "beta": 1}}}


@pytest.mark.parametrize(
    ("key", "name", "sentence"),
    [
        ("backbone", "backbone/sdxl-lorra.yaml", r"did you mean backbone/sdxl-lora.yaml"),
        ("judge", "judge/pikscore.yaml", r"did you mean judge/pickscore.yaml"),
        ("trainer", "hardware/zero4.yaml", r"did you mean hardware/zero[23].yaml"),
        ("model", "parts/metod.yaml", r"did you mean parts/method.yaml"),
        ("model", "../secret.yaml", r"shipped parts are backbone/NAME.yaml, judge/NAME.yaml"),
    ],
)
def test_a_name_that_is_no_part_is_refused(
    key: str,
    name: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "method.yaml").write_text("class_path: SPO")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        named_recipes(["fit", "--config", "toy-spo", f"--model.{key}", name])
    (tmp_path / "mine.yaml").write_text(f"{key}: {name}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "mine.yaml")])
    said = f"{stop.value.code}{capsys.readouterr().err}"
    assert f"{key}: {name} is neither a file in {tmp_path} nor a shipped part" in said


def test_other_texts_stay_what_they_are(tmp_path: Path) -> None:
    plain = {"labels": "mine.yaml", "path": "a/b.yaml", "text": "a cat", "list": ["x.yaml", 1]}
    assert resolve(plain, tmp_path) == plain
    assert resolve({"trainer.max_steps": 3}, tmp_path) == {"trainer.max_steps": 3}
    assert len(shipped_parts()) == len({*shipped_parts()}) > 10


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate"])
@pytest.mark.parametrize("where", ["beside", "here"])
def test_a_method_of_ones_own_is_found(
    command: str,
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the recipe from another folder, and in the current folder without a recipe."""
    name = f"own_{command}_{where}"
    text = (
        f"backbone: ToyDiffusion\nmodel: {{class_path: {name}.{name.title()}, init_args: "
        "{beta: 7, optimizer: {class_path: AdamW, init_args: {lr: 0.5}}}}\n"
    )
    recipe = own_recipe(tmp_path / "own", name, text)
    monkeypatch.chdir(tmp_path if where == "beside" else tmp_path / "own")
    arguments = ["--config", recipe if where == "beside" else "mine.yaml"]
    config = resolved(capsys, command, *arguments)
    assert config["model"]["class_path"] == f"{name}.{name.title()}"
    assert config["model"]["init_args"]["beta"] == 7


def own_run(recipe: list[str], folder: Path, name: str) -> list[str]:
    """Return the arguments of a small run of a method of one's own, beside its recipe."""
    config = f"""
model:
  class_path: {name}.{name.title()}
  init_args:
    beta: 100
    optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-3}}}}
trainer: {{accelerator: cpu, devices: 1}}
"""
    path = own_recipe(folder, name, config)
    return ["--config", path, *recipe[recipe.index("--backbone") :]]


def test_an_estimate_of_a_method_of_ones_own(recipe: list[str], tmp_path: Path) -> None:
    found = estimate([*own_run(recipe, tmp_path / "own", "own_estimate"), "--steps", "1"])
    assert found.step_pairs == 4


def test_a_method_of_ones_own_on_two_ranks(recipe: list[str], tmp_path: Path) -> None:
    """Under torchrun from another folder, as the console script would have it."""
    arguments = own_run(recipe, tmp_path / "own", "own_ranks")
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = finished(launch(["fit", *arguments, "--trainer.max_steps", "1"], command=TWO_RANKS))
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert stored["model"]["class_path"] == "own_ranks.Own_Ranks", said


def test_rounds_of_a_method_of_ones_own(
    tiny_folder: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are processes of their own, which find the method as well."""
    backbone = f"{{class_path: StableDiffusion, init_args: {{pretrained: {tiny_folder}}}}}"
    common = f"backbone: {backbone}\ntrainer: {{accelerator: cpu, devices: 1, max_steps: 1"
    fit = own_recipe(
        tmp_path / "own",
        "own_rounds",
        "model: {class_path: own_rounds.Own_Rounds, init_args: {beta: 100,"
        " optimizer: {class_path: AdamW, init_args: {lr: 1.0e-3}}}}\n"
        f"data: {{class_path: PairShards, init_args: {{shards: {shards}, batch_size: 4,"
        " resolution: 32, workers: 0}}\n"
        f"{common}, limit_val_batches: 0}}\n",
    )
    (tmp_path / "own" / "generate.yaml").write_text(
        "model: {class_path: SelfPlay, init_args: {output: unused, sampling: {steps: 2}}}\n"
        f"data: {{class_path: PairGroups, init_args: {{shards: {shards}, group_size: 6}}}}\n"
        f"{common}}}\n"
    )
    rounds = ["rounds", "--fit", fit, "--generate", str(tmp_path / "own" / "generate.yaml")]
    main([*rounds, "--count", "1", "--output", str(tmp_path / "out")])
    stored = yaml.safe_load((tmp_path / "out" / "round-0" / "recipe.yaml").read_text())
    assert stored["model"]["class_path"] == "own_rounds.Own_Rounds"


def test_a_foreign_folder_is_read_as_data(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an evaluation nor an export imports what a recipe found in a folder names."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "unet").symlink_to(Path(tiny_folder) / "unet")
    (foreign / "evil_thing.py").write_text("raise SystemExit('imported')")
    recipe = {"backbone": {"class_path": "evil_thing.B", "init_args": {"pretrained": tiny_folder}}}
    recipe["model"] = {"class_path": "evil_thing.M", "init_args": {}}
    (foreign / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "prompts.txt").write_text("a cat\nthe sea\n")
    monkeypatch.chdir(foreign)  # even here
    main(
        [
            *("evaluate", "--config", "toy", "--model.policy", str(foreign / "unet")),
            *("--model.reference", tiny_folder, "--model.base", tiny_folder),
            *("--model.judge", "tests.evaluate.test_two_models.Redness"),
            *("--model.sampling.steps", "2", "--model.output", str(tmp_path / "out")),
            *("--data.prompts", "PromptFile", "--data.prompts.path", str(tmp_path / "prompts.txt")),
            *("--data.group_size", "2", "--trainer.enable_progress_bar", "false"),
        ]
    )
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["prompts"] == 2
    main(["export", "--source", str(foreign), "--to", "unet", "--output", str(tmp_path / "e")])
    assert (tmp_path / "e" / "config.json").is_file()
    assert "evil_thing" not in sys.modules


def test_export_does_not_look_for_modules(tmp_path: Path) -> None:
    """A console script has neither the current folder nor a recipe's on its path."""
    script = (
        "import sys; from lit_prefopt.cli import main\n"
        "try: main(['export', '--source', '.', '--to', 'unet', '--output', 'out'])\n"
        "except SystemExit: pass\n"
        f"assert {str(tmp_path)!r} not in sys.path, sys.path\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True)

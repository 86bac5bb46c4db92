"""What is wrong with a command line or a recipe, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_prefopt.command_line.parser import PlainParser
from lit_prefopt.recipe_strings import read_recipe
from tests.command_line.shapes import small_parser

OPTIMIZER = "optimizer: {class_path: Adam, init_args: {lr: 1}}"
GOOD = "model: {class_path: Plain, init_args: {beta: 1, " + OPTIMIZER + "}}"


def message(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a parser prints before it ends with exit code 2."""
    PlainParser.files = read_recipe(args)
    try:
        with pytest.raises(SystemExit) as stop:
            small_parser().parse_args(["fit", *args, "--trainer.fast", "true"])
    finally:
        PlainParser.files = ()
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("lit-prefopt: ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--model.betta 3", "--model.betta: did you mean --model.beta?"),
        ("--model.init_args.betta 3", "--model.betta: did you mean --model.beta?"),
        ("--model.optimizer.lrr 3", "--model.optimizer.lrr: did you mean --model.optimizer.lr?"),
        ("--model.optimiser.lr 3", "--model.optimiser.lr: did you mean --model.optimizer?"),
        ("--trainer.max_stepz 3", "--trainer.max_stepz: did you mean --trainer.max_steps?"),
        ("--sed 3", "--sed: there is no such key; `--help` lists all."),
        ("--trainer.max_steps abc", "--trainer.max_steps: 'abc' is given, but expected is a whole"),
        ("--model.beta abc", "--model.beta: 'abc' is given, but expected is a number."),
        ("--model.optimizer.lr abc", "--model.optimizer.lr: 'abc' is given, but expected is a num"),
        ("--model.kind c", "--model.kind: 'c' is given, but expected is one of a, b."),
        ("--model.limit x", "--model.limit: 'x' is given, but expected is a whole number or null"),
        (
            "--model DifusionDPO",
            "--model: there is no class DifusionDPO; did you mean DiffusionDPO",
        ),
        ("--model.optimizer AdmW", "--model.optimizer: there is no class AdmW; did you mean AdamW"),
        ("--model.help Plane", "--model.help: there is no class Plane; "),
        ("--model no/part.yaml", "--model: there is no file no/part.yaml."),
        ("--model.link json.nope", "--model.link: module 'json' has no attribute 'nope'."),
        (
            "--trainer.callbacks+ Evaluation --trainer.callbacks.jugde Judge",
            "--trainer.callbacks.jugde: did you mean --trainer.callbacks.judge?",
        ),
        (
            "--trainer.precision half",
            "--trainer.precision: 'half' is given, but expected is a whole number or one of mixed",
        ),
    ],
)
def test_arguments(
    args: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    assert message(["--config", str(tmp_path / "good.yaml"), *args.split()], capsys).startswith(
        said
    )


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (GOOD.replace("beta", "betta"), "model.betta: did you mean model.beta?"),
        (GOOD.replace("lr", "lrr"), "model.optimizer.lrr: did you mean model.optimizer.lr?"),
        (GOOD.replace("beta: 1", "beta: abc"), "model.beta: 'abc' is given, but expected is a num"),
        (GOOD.replace("Plain", "DifusionDPO"), "model: there is no class DifusionDPO; did you mea"),
        ("trianer: {max_steps: 3}", "trianer.max_steps: did you mean trainer.max_steps?"),
        ("trainer: {max_stepz: 3}", "trainer.max_stepz: did you mean trainer.max_steps?"),
        ("model: {beta: 3", "this is no YAML near line 1"),
        (
            "trainer: {callbacks: [{class_path: Evaluation, init_args: {judge: Judge, evry: 2}}]}",
            "trainer.callbacks.evry: did you mean trainer.callbacks.every?",
        ),
    ],
)
def test_recipes(
    recipe: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(recipe)
    assert message(["--config", str(file)], capsys).startswith(f"{file}: {said}")


def test_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = message(["--model", "Plain"], capsys)
    assert said == "--model.optimizer, --model.beta: Plain has no default; give a value."


def test_a_long_value_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    for args in (["--model.beta", "x" * 9999], [f"--model.{'b' * 9999}", "1"]):
        said = message(["--config", str(tmp_path / "good.yaml"), *args], capsys)
        assert len(said) < 1000
        assert "..." in said

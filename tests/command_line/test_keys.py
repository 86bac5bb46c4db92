"""Misspelt keys and help pages without torch: what the table answers is what the parser answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import yaml

from lit_prefopt.command_line.keys import check_keys
from lit_prefopt.command_line.table import Table, load_table, store_table, table_path
from lit_prefopt.configs import recipe_names
from lit_prefopt.errors import InputError, UsageError
from lit_prefopt.lightning_cli import run_lightning
from lit_prefopt.recipe_files import named_recipes

CLASSES = ["DiffusionDPO", "AdamW", "ToyDiffusion", "ToyPairs", "Checkpoints", "Evaluation"]
CLASSES += ["AdamW8bit", "Lion8bit", "Adafactor"]  # with AdamW, all that `optimizer` takes
CLASSES += ["ToyPrompts", "SPO", "CSVLogger", "ModelCheckpoint", "StableDiffusion"]
UNREADABLE = "RunDirectory"  # its argument `config` is of a type that jsonargparse does not read
TOY = ["--config", "toy-diffusion-dpo"]
WRONG = {
    "--model.betta 3": "--model.betta: did you mean --model.beta?",
    "--model.init_args.betta 3": "did you mean --model.beta?",
    "--model.optimizer.lrr 3": "--model.optimizer.lrr: did you mean --model.optimizer.lr?",
    "--trainer.max_stepz 3": "--trainer.max_stepz: did you mean --trainer.max_steps?",
    "--trianer.max_steps 3": "--trianer.max_steps: did you mean --trainer.max_steps?",
    "--data.bach_size 3": "--data.bach_size: did you mean --data.batch_size?",
}
FILES = {
    "model: {class_path: DiffusionDPO, init_args: {betta: 3}}": "model.betta: did you mean",
    "model: {class_path: DifusionDPO}": "model: DifusionDPO: did you mean DiffusionDPO?",
    "trianer: {max_steps: 3}": "trianer: did you mean trainer?",
    "trainer: {max_stepz: 3}": "trainer.max_stepz: did you mean trainer.max_steps?",
    "trainer: {callbacks+: [{class_path: Evaluation, init_args: {jugde: ToyJudge}}]}": (
        "trainer.callbacks.jugde: did you mean trainer.callbacks.judge?"
    ),
}
ACCEPTED = [
    "--model.beta 3",
    "--model.optimizer.lr 3",
    "--model.optimizer AdamW8bit",
    "--trainer.callbacks+ Evaluation --trainer.callbacks.judge ToyJudge",
    "--backbone.lora.rank 4",
    "--trainer.logger CSVLogger --trainer.logger.save_dir runs",
    "--trainer.callbacks+=tests.test_cli.Modes --model tests.test_cli.Own --model.own 3",
]


PAGES = [
    ["fit", "--help"],
    ["validate", "-h"],
    ["fit", "--model.help", "DiffusionDPO"],
    ["fit", "--backbone.help=lit_prefopt.toy.ToyDiffusion"],
]
WRITE = """
import io, json, sys
from contextlib import redirect_stdout, suppress
from lit_prefopt.command_line.table import store_table
from lit_prefopt.commands.help_pages import import_classes, write_table
from lit_prefopt.lightning_cli import run_lightning
import_classes()
for args in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        run_lightning(args)
    print(json.dumps(printed.getvalue()))
store_table(write_table(sys.argv[2:]))
"""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, list[str]]:
    """The table with the pages of the commands and of a few classes, and pages of the parser.

    They are written by another process: an argument also takes the classes that earlier tests of
    this one imported, such as the optimizers of DeepSpeed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "80")
        output = run(WRITE, [json.dumps(PAGES), *CLASSES, UNREADABLE])
        assert output.returncode == 0, output.stderr
        table = load_table()
    assert table is not None
    return table, [json.loads(line) for line in output.stdout.splitlines()]


@pytest.fixture(scope="session")
def table(written: tuple[Table, list[str]]) -> Table:
    """The table."""
    return written[0]


def test_a_class_whose_page_cannot_be_built_is_left_out(table: Table) -> None:
    callbacks = table.options("fit")["trainer.callbacks"].classes
    [unreadable] = [path for path in callbacks if path.endswith(f".{UNREADABLE}")]
    assert f"trainer.callbacks {unreadable}" not in table.helps
    assert table.arguments(unreadable) is None
    assert all(name in table.by_name for name in CLASSES)


def test_the_page_of_such_a_class_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="argument that no recipe can give.*Namespace is only"):
        run_lightning(["fit", f"--trainer.callbacks.help={UNREADABLE}"])


def parse(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Return how the parser ends and what it prints."""
    with pytest.raises(SystemExit) as stop:
        run_lightning([*args, "--print_config"])
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("wrong", WRONG)
def test_a_misspelt_key_is_refused_as_the_parser_refuses_it(
    wrong: str, table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    args = named_recipes(["fit", *TOY, *wrong.split()])
    with pytest.raises(UsageError) as refused:
        check_keys(args, table)
    assert WRONG[wrong] in str(refused.value)
    code, printed = parse(args, capsys)
    assert code == 2
    assert str(refused.value).split(":")[-1] in printed or "there is no such key" in printed


@pytest.mark.parametrize("wrong", FILES)
def test_a_misspelt_key_of_a_recipe_is_refused_as_the_parser_refuses_it(
    wrong: str, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(wrong)
    args = named_recipes(["fit", *TOY, "--config", str(file)])
    with pytest.raises(UsageError) as refused:
        check_keys(args, table)
    assert str(refused.value).startswith(f"{file}: {FILES[wrong]}")
    assert parse(args, capsys)[0] == 2


@pytest.mark.parametrize("right", ACCEPTED)
def test_what_may_be_right_is_left_to_the_parser(right: str, table: Table) -> None:
    check_keys(named_recipes(["fit", *TOY, *right.split()]), table)


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_is_refused(name: str, table: Table) -> None:
    check_keys(named_recipes(["fit", "--config", name]), table)


def test_overrides_of_parts_are_checked_too(table: Table, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    recipe = {"backbone": "backbone/sd15.yaml", "backbone.gradient_chekpointing": True}
    file.write_text(yaml.safe_dump(recipe))
    said = r"own\.yaml: backbone\.gradient_chekpointing: did you mean backbone\.gradient_ch"
    with pytest.raises(UsageError, match=said):
        check_keys(["fit", "--config", str(file)], table)


@pytest.mark.parametrize(
    ("args", "code"),
    [*((page, 0) for page in PAGES), (["fit", *TOY, "--model.betta", "3"], 2)],
)
def test_the_table_answers_without_torch(
    args: list[str],
    code: int,
    written: tuple[Table, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    table, pages = written
    store_table(table)
    program = (
        "import sys; from lit_prefopt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    answered = run(program, args)
    assert answered.returncode == code, answered.stderr
    if not code:
        assert answered.stdout == pages[PAGES.index(args)]
        assert "--" in answered.stdout


def test_the_table_is_found_whatever_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools, which libraries import, appends its vendored distributions to `sys.path`."""
    vendored = Path(setuptools.__path__[0]) / "_vendor"
    assert list(vendored.glob("*.dist-info"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(vendored)])
    before = table_path()
    sys.path.append(str(vendored))
    assert table_path() == before


def run(program: str, args: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, which has imported nothing."""
    return subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)

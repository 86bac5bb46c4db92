"""Outputs of `predict` and `evaluate`: full disks, damaged parts, other processes, left-overs."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from tests.evaluate.test_two_models import command as evaluation
from tests.generate.test_generator import on_pairs
from tests.helpers.runs import file_size_limit
from tests.utils.test_output_lock import end, hold


@pytest.fixture
def predict(tiny_folder: str, shards: str, tmp_path: Path) -> list[str]:
    """Arguments of a generation of twelve groups."""
    root = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.logger", "false"]
    return [*on_pairs(tiny_folder, tmp_path / "out", shards), *root]


@pytest.fixture
def evaluate(tiny_folder: str, tmp_path: Path) -> list[str]:
    """Arguments of an evaluation of two groups."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nthe sea\n")
    arguments = evaluation(tiny_folder, tmp_path / "out", tmp_path / "prompts.txt")
    return [*arguments, "--trainer.logger", "false"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "size", "file", "left"),
    [
        ("predict", 5000, "00000000", ["generation.json"]),
        ("evaluate", 300, "settings.json", []),
    ],
)
def test_a_full_disk_is_a_sentence(
    kind: str,
    size: int,
    file: str,
    left: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    arguments = request.getfixturevalue(kind)
    sentence = rf"out\.parts/{file} cannot be written \(File too large\): .*free disk space"
    with file_size_limit(size), pytest.raises(SystemExit, match=sentence):
        main(arguments)
    assert not (tmp_path / "out").exists()
    assert names(tmp_path / "out.parts") == left
    main(arguments)  # with space again
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["predict", "evaluate"])
def test_an_output_in_use_is_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    arguments = request.getfixturevalue(kind)
    holder = hold(tmp_path / "out")
    try:
        with pytest.raises(SystemExit, match=f"out is being written by .*process {holder.pid} on"):
            main(arguments)
    finally:
        end(holder)
    assert not (tmp_path / "out.parts").exists()
    main(arguments)
    assert not list(tmp_path.glob(".out*"))


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_stops_after_the_first_group(
    predict: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**20 + 1))
    monkeypatch.setattr("lit_prefopt.utils.output_lock.LEAST_BYTES", 0)
    main([*predict, "--trainer.limit_predict_batches", "2"])  # small groups fit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 10_000))
    shutil.rmtree(tmp_path / "out.parts")
    with pytest.raises(SystemExit, match=r"out has 0\.0 MB free: 11 groups need about 0\.\d MB"):
        main(predict)
    assert names(tmp_path / "out.parts") == ["00000000", "generation.json"]


def test_too_little_space_for_an_evaluations_images_stops_it_at_the_start(
    evaluate: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # three prompts, two models, 32 x 32 pixels
    monkeypatch.setattr("lit_prefopt.utils.output_lock.LEAST_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 3 * 2 * 32 * 32 - 1))
    with pytest.raises(SystemExit, match="free disk space or choose another folder"):
        main(evaluate)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("settings.json", b"{"),
        ("settings.json", b"[1]"),
        ("00000000/counts.json", b"\xff"),
        ("00000000/per_prompt.jsonl", b'{"text": 1}\n'),
        ("00000000/per_prompt.jsonl", b"\xff\n"),
    ],
)
def test_a_damaged_part_is_named(
    file: str, content: bytes, evaluate: list[str], tmp_path: Path
) -> None:
    main([*evaluate, "--trainer.limit_predict_batches", "1"])
    path = tmp_path / "out.parts" / file
    path.write_bytes(content)
    lost = re.escape(str(path.parent))
    with pytest.raises(SystemExit, match=f"{lost}.* is damaged.*remove .* and resume"):
        main(evaluate)
    shutil.rmtree(path.parent)
    main(evaluate)
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_left_overs_of_a_killed_evaluation_are_removed(evaluate: list[str], tmp_path: Path) -> None:
    (tmp_path / ".out.abcd1234.partial" / "out").mkdir(parents=True)
    main(evaluate)
    assert names(tmp_path) == ["out", "prompts.txt"]

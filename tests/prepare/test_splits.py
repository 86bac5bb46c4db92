"""Held-out files of a dataset never become training pairs without a word."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import convert
from tests.helpers.shards import picture
from tests.helpers.sources import samples


def hub(folder: Path, *names: str) -> Path:
    """Write parquet files of one pair each, whose prompt is the file's name."""
    folder.mkdir()
    for number, name in enumerate(names):
        row = {"prompt": [name], "chosen": [picture(number)], "rejected": [picture(number + 50)]}
        pq.write_table(pa.table(row), folder / f"{name}.parquet")
    return folder


def texts(folder: Path) -> list[str]:
    return [sample.text for sample in samples(folder)]


def test_only_the_training_split_of_a_folder_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train = ["train-00000-of-00002-b66ac786bf6fb553", "train-00001-of-00002-b66ac786bf6fb553"]
    held_out = ["dev", "pickapic_test_unique-00000-of-00002", "pickapic_test_unique-00001-of-00002"]
    folder = hub(tmp_path / "data", *train, *held_out)
    main(["shards", "convert", "--source", str(folder), "--output", str(tmp_path / "out")])
    assert texts(tmp_path / "out") == train
    printed = capsys.readouterr().out
    assert "2 of 5 files are read, without the splits dev" in printed
    pattern = f"{folder}/pickapic_test_unique-*.parquet"  # the offer works as it stands
    assert f"pickapic_test_unique (`--source '{pattern}'`)" in printed
    convert(pattern, str(tmp_path / "test"))
    assert texts(tmp_path / "test") == held_out[1:]


def test_a_pattern_of_several_splits_is_cut_down_too_and_braces_are_not(tmp_path: Path):
    folder = hub(tmp_path / "data", "train-0", "validation-0", "contest", "part_of_a_train_test")
    convert(f"{folder}/*.parquet", str(tmp_path / "all"))
    assert texts(tmp_path / "all") == ["contest", "part_of_a_train_test", "train-0"]
    convert(f"{folder}/{{validation,train}}-*.parquet", str(tmp_path / "named"))
    assert texts(tmp_path / "named") == ["validation-0", "train-0"]


def test_one_held_out_split_alone_is_read_and_of_several_one_must_be_chosen(tmp_path: Path):
    convert(str(hub(tmp_path / "one", "val-0", "val-1")), str(tmp_path / "out"))
    assert texts(tmp_path / "out") == ["val-0", "val-1"]
    folder = hub(tmp_path / "two", "val-0", "test-0")
    with pytest.raises(InputError, match="several splits and none for training; choose one: test"):
        convert(str(folder), str(tmp_path / "none"))


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path: Path):
    folder = hub(tmp_path / "data", "train-0")
    (folder / "train-1.parquet").write_bytes(b"neither")
    pq.write_table(pa.table({"words": ["a cat"]}), folder / "train-2.parquet")
    summary = convert(str(folder), str(tmp_path / "out"))
    assert texts(tmp_path / "out") == ["train-0"]
    assert "train-1.parquet cannot be read as parquet" in summary.broken.names[0]
    assert "train-2.parquet has the columns words and none" in summary.broken.names[1]


def test_a_folder_without_data_is_named_with_its_content(tmp_path: Path):
    (tmp_path / "sheet.xlsx").write_bytes(b"")
    (tmp_path / "inner").mkdir()
    with pytest.raises(InputError, match="nor parquet nor tar files, but inner/, sheet.xlsx; name"):
        convert(str(tmp_path), str(tmp_path / "out"))

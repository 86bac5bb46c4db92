"""Shipped sets of columns, by name on the command line, and names of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.datamodules import PairShards
from lit_prefopt.prepare import Columns
from tests.helpers.shards import picture
from tests.helpers.sources import pair, samples, sides, write

HPD2 = {"prompt": "a cat", "human_preference": [0, 1], "user_hash": "x"}
THREE = {"prompt": "a cat", "image_path": ["1.png", "2.png", "3.png"], "rank": [1, 2, 2]}
ONES = {"raw_annotations": [{"rank": [1, 2, 3]}, {"rank": [2, 1, 3]}]}
HPD3 = {"prompt": "a cat", "path1": "1.png", "path2": "2.png", "confidence": None}
PICK = {"caption": "a cat", "jpg_0": "1.png", "jpg_1": "2.png"}


@pytest.mark.parametrize(
    ("columns", "record", "expected"),
    [
        ("hpdv2", {**HPD2, "file_path": ["2.png", "1.png"]}, [(1, 2)]),
        ("hpdv2", {**THREE, **ONES}, [(1, 2), (1, 3)]),
        ("hpdv3", {**HPD3, "choice_dist": [3, 9]}, [(1, 2)]),
        ("hpdv3", {**HPD3, "choice_dist": None}, [(1, 2)]),
        ("pickapic", {**PICK, "label_0": 0.0, "has_label": True}, [(2, 1)]),
        ("open-image-preferences", pair(1, 2), [(1, 2)]),
    ],
)
def test_shipped_columns_by_name(
    source: Path, tmp_path: Path, columns: str, record: dict, expected: list
):
    one = tmp_path / "one.json"
    one.write_text(json.dumps([record]))
    output = str(tmp_path / "out")
    args = ["shards", "convert", "--source", str(one), "--output", output, "--columns", columns]
    main(args)
    found = [(chosen, rejected) for _, chosen, rejected in sides(output)]
    assert found == [(picture(chosen), picture(rejected)) for chosen, rejected in expected]


def test_columns_on_the_command_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(source, {"words": "a cat", "path1": "1.png", "path2": "2.png"})
    arguments = ["shards", "convert", "--source", str(source), "--output", str(tmp_path / "out")]
    main([*arguments, "--columns=hpdv3", "--columns.prompt", "words"])
    assert sides(tmp_path / "out") == [("a cat", picture(1), picture(2))]
    with pytest.raises(SystemExit):
        main([*arguments, "--columns", "nope"])
    said = capsys.readouterr().err
    assert "nope is neither a file nor one of the shipped columns; choose one of hpdv2, hp" in said


def test_a_prompt_of_many_examples_weighs_one(source: Path, tmp_path: Path):
    """As training reads them; without the name no weight is written."""
    counts = [("a cat", 4), ("a dog", "2"), ("a cow", 1), ("a bat", None), ("an ant", 0)]
    records = [
        {**PICK, "caption": text, "label_0": 1, "num_example_per_prompt": n} for text, n in counts
    ]
    write(source, *records)
    arguments = ["shards", "convert", "--source", str(source), "--columns", "pickapic"]
    named = ["--columns.examples", "num_example_per_prompt"]
    main([*arguments, "--output", str(tmp_path / "plain")])
    main([*arguments, *named, "--output", str(tmp_path / "weighed")])
    assert [sample.meta for sample in samples(tmp_path / "plain")] == [{}] * 5
    data = PairShards(str(tmp_path / "weighed"), batch_size=4, resolution=8, workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    weights = dict(zip(batch.texts, batch.weights.tolist(), strict=True))
    assert weights == {"a cat": 0.25, "a dog": 0.5, "a cow": 1.0, "a bat": 1.0}  # 0 is no count


def test_columns_know_all_their_names():
    columns = Columns(prompt="words", images=["one", "other"])
    assert {"words", "one", "other", "jpg_0", "has_label"} <= columns.all()
    assert "caption" not in columns.all()

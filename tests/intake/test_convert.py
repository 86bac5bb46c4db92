"""Conversion: counts, ties, gaps, and sentences for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_prefopt.data import convert
from lit_prefopt.data.index import read_index
from lit_prefopt.data.read import Sample, ShardReader

from .conftest import picture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the path of a file to be written, with images 0.png to 4.png beside it."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "source.jsonl"


def write(source: Path, *records: object) -> str:
    """Write records, a line each."""
    source.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return str(source)


def samples(folder: Path) -> list[Sample]:
    """Return all samples of a folder."""
    shards = read_index(folder)
    reader = ShardReader(shards)
    return [reader(s, n) for s, shard in enumerate(shards) for n in range(len(shard.offsets))]


def ranked(**more: object) -> dict[str, object]:
    """Return a record of four images."""
    return {"prompt": "a cat", "images": [f"{n}.png" for n in range(4)], **more}


def test_pairs_of_paths(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    record = {"prompt": "a cat", "chosen": "1.png", "rejected": str(tmp_path / "2.png")}
    summary = convert(write(source, record, record), str(tmp_path / "out"))
    assert summary == (2, 0, 4, [])
    assert "2 pairs from 4 images, 0 ties left out" in capsys.readouterr().out
    assert samples(tmp_path / "out")[0][1:] == ("a cat", [picture(1), picture(2)], None, {})


def test_a_ranking_gives_all_pairs_the_better_side_first(source: Path, tmp_path: Path):
    write(source, ranked(place=[2, 1, 4, 3], points=[5, 9, 1, 2]))
    summary = convert(str(source), str(tmp_path / "out"), ranking="place", scores="points")
    assert summary[:3] == (6, 0, 4)
    first = samples(tmp_path / "out")[0]
    assert first.sides == [picture(1), picture(0)]
    assert first.meta == {
        "gap": 1,
        "ranks": {"chosen": 1, "rejected": 2},
        "scores": {"chosen": 9, "rejected": 5},
    }


def test_scores_alone_best_against_worst(source: Path, tmp_path: Path):
    write(source, ranked(scores=[0.5, 2.0, -1.0, 0.0]))
    convert(str(source), str(tmp_path / "out"), pairs="best-worst")
    [sample] = samples(tmp_path / "out")
    assert sample.sides == [picture(1), picture(2)]
    assert sample.meta == {"gap": 3.0, "scores": {"chosen": 2.0, "rejected": -1.0}}


def test_ties_are_counted_and_left_out(source: Path, tmp_path: Path):
    write(source, ranked(ranking=[1, 1, 2, 2]), ranked(ranking=[1, 1, 1, 1]))
    assert convert(str(source), str(tmp_path / "all"))[:2] == (4, 8)
    assert convert(str(source), str(tmp_path / "two"), pairs="best-worst")[:2] == (1, 1)


def test_a_json_file_of_one_record_or_a_list(source: Path, tmp_path: Path):
    one = source.with_suffix(".json")
    one.write_text(json.dumps(ranked(ranking=[1, 2, 3, 4]), indent=2))
    assert convert(str(one), str(tmp_path / "one")).pairs == 6
    one.write_text(json.dumps([ranked(ranking=[1, 2, 3, 4])] * 2))
    assert convert(str(one), str(tmp_path / "two")).pairs == 12


def test_broken_and_missing_images_are_named_and_left_out(source: Path, tmp_path: Path):
    (tmp_path / "3.png").write_bytes(picture(3)[:60])
    record = ranked(ranking=[1, 2, 3, 4])
    record["images"][0] = "gone.png"
    summary = convert(write(source, record, record), str(tmp_path / "out"))
    assert summary[:3] == (2, 0, 4)
    assert len(summary.broken) == 2
    assert "gone.png cannot be read (No such file" in str(summary)
    assert "3.png cannot be decoded" in str(summary)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a cat"}, "line 1 has no text under 'prompt'"),
        ({"prompt": "a cat", "best": "1.png"}, "has neither 'images' nor 'chosen' and 'rejected'"),
        ({"prompt": "a cat", "chosen": 1, "rejected": 2}, "has neither 'images' nor"),
        (ranked(), "has neither 'ranking' nor 'scores'"),
        (ranked(ranking=[1, 2]), "not one number for each path"),
        (ranked(scores=[1, 2, 3, float("nan")]), "not one number for each path"),
        ([1], "has no text"),
        (ranked(ranking=[1, 1, 1, 1]), "gives no pair .6 ties"),
    ],
)
def test_bad_records_are_refused_in_a_sentence(source: Path, tmp_path: Path, record, message):
    with pytest.raises(ValueError, match=message):
        convert(write(source, record), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_files_are_refused_in_a_sentence(source: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read"):
        convert(str(source), str(tmp_path / "out"))
    source.write_bytes(b"\n{broken")
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        convert(str(source), str(tmp_path / "out"))
    source.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        convert(str(source), str(tmp_path / "out"))

"""Tables as spreadsheets and scripts write them, and tables with an image per row."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_prefopt.errors import InputError
from lit_prefopt.prepare import Columns, convert, image_rows
from lit_prefopt.prepare.form_pairs import Matches
from tests.helpers.shards import picture
from tests.helpers.sources import samples, sides

CATS = [("a cat", picture(1), picture(2)), ("a dog", picture(4), picture(3))]
ROWS = [["prompt", "chosen", "rejected"], ["a cat", "1.png", "2.png"], ["a dog", "4.png", "3.png"]]


def joined(mark: str) -> str:
    return "\n".join(mark.join(row) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("p.csv", joined(";"), "utf-8"),
        ("p.CSV", joined("|"), "utf-8-sig"),
        ("p.csv", joined("\t"), "utf-16"),
        ("p.TSV", joined(","), "utf-16-be"),
        ("p.csv", "sep=;\n" + joined(";"), "utf-8"),
        ("p.csv", joined(",").title().replace("Png", "png"), "utf-16-le"),
        ("p.csv", joined(", "), "utf-8"),
        ("p.tsv", joined("\t").replace("\n", "\r\n"), "utf-32"),
    ],
)
def test_delimiters_and_encodings(
    source: Path, tmp_path: Path, name: str, text: str, encoding: str
):
    (tmp_path / name).write_bytes(text.replace(", 1", ",1").encode(encoding))
    if ", " in text:  # a space before a path is a part of it
        for number in range(5):
            (tmp_path / f" {number}.png").write_bytes(picture(number))
    convert(str(tmp_path / name), str(tmp_path / "out"))
    found = [(prompt.lower(), *images) for prompt, *images in sides(tmp_path / "out")]
    assert found == CATS


def test_quotes_that_belong_to_the_text_cost_no_row(source: Path, tmp_path: Path):
    rows = [
        'prompt\tchosen\trejected',
        '"Big" cat\t1.png\t2.png',
        '"a quote that never closes\t1.png\t2.png',
        '"another one\t3.png\t4.png',
        'a 5" cat\t2.png\t1.png',
        '"a ""quoted"" cat\n\nof three lines"\t4.png\t3.png',
        '"the last one\t1.png\t3.png',
    ]  # fmt: skip
    for name, mark in (("p.tsv", "\t"), ("p.csv", ",")):
        (tmp_path / name).write_text("\n".join(rows).replace("\t", mark))
        assert convert(str(tmp_path / name), str(tmp_path / f"out-{name}")).broken.count == 0
        assert [sample.text for sample in samples(tmp_path / f"out-{name}")] == [
            '"Big" cat',
            '"a quote that never closes',
            '"another one',
            'a 5" cat',
            'a "quoted" cat\n\nof three lines',
            '"the last one',
        ]


def test_a_table_without_a_header_is_a_message(tmp_path: Path):
    (tmp_path / "p.csv").write_text("x" * 200_000 + "\n")
    with pytest.raises(InputError, match="p.csv has no valid first row .field larger"):
        convert(str(tmp_path / "p.csv"), str(tmp_path / "out"))
    (tmp_path / "p.csv").write_text("")
    with pytest.raises(InputError, match="it holds no record"):
        convert(str(tmp_path / "p.csv"), str(tmp_path / "out"))
    (tmp_path / "p.csv").write_text("a cat;1.png;2.png\na dog;3.png;4.png\n")
    with pytest.raises(InputError, match="it has 'a cat', '1.png', '2.png'"):
        convert(str(tmp_path / "p.csv"), str(tmp_path / "out"))


def test_a_cut_utf16_file_keeps_what_is_before_the_cut(source: Path, tmp_path: Path):
    lines = "\n".join(['{"prompt": "a cat", "chosen": "1.png", "rejected": "2.png"}', "{", "x"])
    (tmp_path / "p.jsonl").write_bytes(lines.encode("utf-16")[:-1])
    summary = convert(str(tmp_path / "p.jsonl"), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS[:1]
    assert "p.jsonl cannot be read further" in summary.broken.names[-1]


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows))
    return str(path)


@pytest.mark.parametrize(("matches", "pairs"), [("all", 4), ("best-worst", 2)])
def test_rows_with_one_image_are_ranked_by_prompt(
    source: Path, tmp_path: Path, matches: Matches, pairs: int
):
    rows = ["prompt,image,rank", "a cat,0.png,3", "a dog,3.png,2", "a cat,1.png,1", "a dog,4.png,1"]
    name = table(tmp_path / "p.csv", *rows, "a cat,2.png,2", "a hen,2.png,1", "a dog,1.png,best")
    summary = convert(name, str(tmp_path / "out"), pairs=matches)
    assert summary.pairs == pairs
    found = [(s.text, *s.sides) for s in samples(tmp_path / "out")]
    assert ("a cat", picture(1), picture(0)) in found
    assert ("a dog", picture(4), picture(3)) in found
    ranks = [s.meta["ranks"] for s in samples(tmp_path / "out") if s.text == "a dog"]
    assert ranks == [{"chosen": 1, "rejected": 2}]
    assert "line 8 has no number under 'ranking' or 'rank'" in summary.broken.names[0]
    assert "line 7 has 1 image, and a pair needs two" in summary.broken.names[1]


def test_scores_of_rows_tie_and_prompts_of_two_tasks_stay_apart(source: Path, tmp_path: Path):
    rows = ["prompt;image_path;score;prompt_id", "x;0.png;0,5;7", "x;1.png;0,5;7", "x;2.png;0,1;7"]
    name = table(tmp_path / "p.csv", *rows, "x;3.png;9;8", "x;4.png;8;8")
    summary = convert(name, str(tmp_path / "out"))
    assert (summary.pairs, summary.ties) == (3, 1)
    expected = [(0, 2), (1, 2), (3, 4)]
    assert [tuple(s.sides) for s in samples(tmp_path / "out")] == [
        (picture(chosen), picture(rejected)) for chosen, rejected in expected
    ]


def test_rows_with_bytes_are_written_when_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_rows, "MAX_HELD", 3 * len(picture(1)))
    order = [
        ("a", 1, 1),
        ("a", 2, 2),
        ("b", 3, 1),
        ("b", 4, 2),
        ("c", 5, 2),
        ("c", 6, 1),
        ("a", 7, 3),
    ]
    prompts, numbers, ranks = zip(*order, strict=True)
    columns = {"prompt": prompts, "rank": ranks, "image": [picture(n) for n in numbers]}
    pq.write_table(
        pa.table({name: list(cells) for name, cells in columns.items()}), tmp_path / "p.parquet"
    )
    summary = convert(str(tmp_path / "p.parquet"), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == [
        ("a", picture(1), picture(2)),
        ("b", picture(3), picture(4)),
        ("c", picture(6), picture(5)),
    ]
    assert "row 7 comes after other prompts; sort the rows by prompt" in summary.broken.names[0]


def test_rows_without_a_rating_are_named_with_their_columns(source: Path, tmp_path: Path):
    name = table(tmp_path / "p.csv", "prompt,image,stars", "x,0.png,5", "x,1.png,1", ",2.png,1")
    columns = Columns(scores="stars")
    summary = convert(name, str(tmp_path / "out"), columns=columns)
    assert (summary.pairs, summary.broken.count) == (1, 1)
    with pytest.raises(ValueError, match="3 broken; .*line 2 has no number under .*'stars'"):
        convert(name, str(tmp_path / "none"))


def test_a_list_in_a_cell_of_a_table(source: Path, tmp_path: Path):
    rows = [
        "prompt,images,ranking",
        '''"a cat","['1.png', '2.png']","[1, 2]"''',
        "a dog,3.png|4.png,2 1",
    ]
    convert(table(tmp_path / "p.csv", *rows), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS

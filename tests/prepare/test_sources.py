"""Every format: the same two pairs come out, and what is wrong is named."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_prefopt.errors import InputError
from lit_prefopt.prepare import convert
from lit_prefopt.prepare import tables as tables_module
from tests.helpers.shards import picture
from tests.helpers.sources import pair, sides, write

CATS = [("a cat", picture(1), picture(2)), ("a dog", picture(4), picture(3))]


def pick_a_pic(**more: list) -> pa.Table:
    """Return the two pairs as Pick-a-Pic stores them."""
    return pa.table(
        {
            "jpg_0": [picture(1), picture(3)],
            "jpg_1": [picture(2), picture(4)],
            "label_0": [1.0, 0.0],
            "caption": ["a cat", "a dog"],
            "model_0": ["left", "alone"],
            **more,
        }
    )


def structs(*numbers: int) -> list[dict]:
    """Return pictures as the datasets library stores them: bytes, or a path alone."""
    first, *rest = numbers
    return [
        {"bytes": picture(first), "path": "nowhere.png"},
        *({"bytes": None, "path": f"{n}.png"} for n in rest),
    ]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def pick_a_tar(path: Path, key: str, text: bytes, first: int, label: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        add(tar, f"{key}.jpg_0.jpg", picture(first))
        add(tar, f"{key}.jpg_1.jpg", picture(first + 1))
        add(tar, f"{key}.label_0.txt", label)
        add(tar, f"{key}.original_prompt.txt", text)
        add(tar, f"{key}.evil.pyd", b"never read")


def test_jsonl_and_json_of_any_shape(source: Path, tmp_path: Path):
    records = [pair(1, 2), pair(4, 3, "a dog")]
    one, lines = tmp_path / "one.json", write(source, *records)
    shapes = {
        "list": json.dumps(records, indent=2),
        "lines": "\n".join(map(json.dumps, records)),
        "single": json.dumps(records[0]),
    }
    for name, text in shapes.items():
        one.write_text(text)
        convert(str(one), str(tmp_path / name))
        assert sides(tmp_path / name) == CATS[: 1 if name == "single" else 2], name
    convert(lines, str(tmp_path / "jsonl"))
    assert sides(tmp_path / "jsonl") == CATS


def test_a_long_json_list_is_read_in_pieces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tables_module, "CHUNK", 7)
    one = tmp_path / "one.json"
    one.write_text(json.dumps([pair(1, 2, f"text {n}, [{{") for n in range(30)]))
    convert(str(one), str(tmp_path / "out"))
    assert [text for text, *_ in sides(tmp_path / "out")] == [f"text {n}, [{{" for n in range(30)]


def test_csv_and_tsv(source: Path, tmp_path: Path):
    rows = [["prompt", "chosen", "rejected", "note"], ["a cat", "1.png", "2.png", ""]]
    rows += [["a dog", "4.png", "3.png", "x"]]
    for name, mark in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"table.{name}"
        path.write_text("\ufeff" + "\n".join(mark.join(row) for row in rows))
        convert(str(path), str(tmp_path / name))
        assert sides(tmp_path / name) == CATS
    path = tmp_path / "labels.csv"
    path.write_text('caption,jpg_0,jpg_1,label_0\n"a cat",1.png,2.png,1.0\na dog,3.png,4.png,0\n')
    convert(str(path), str(tmp_path / "labels"))
    assert sides(tmp_path / "labels") == CATS


def test_broken_rows_of_a_table_are_named(source: Path, tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_bytes(
        b"prompt,chosen,rejected\na cat,1.png,2.png\na cat,1.png\na,b,c,d\n\xff,1.png,2.png\n"
        + b"x" * 200_000  # more than a cell may have
        + b",1.png,2.png\n"
    )
    summary = convert(str(path), str(tmp_path / "out"))
    assert summary.pairs == 1
    reasons = ("has no image under 'rejected'", "has 4 cells", "not UTF-8", "is not a valid row")
    assert [r in n for r, n in zip(reasons, summary.broken.names, strict=True)] == [True] * 4
    assert "table.csv, line 3" in summary.broken.names[0]


def test_parquet_of_bytes_one_file_a_folder_and_a_pattern(tmp_path: Path):
    (tmp_path / "data").mkdir()
    table = pick_a_pic()
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=1)
    for number in range(2):
        pq.write_table(table.slice(number, 1), tmp_path / "data" / f"train-{number}.parquet")
    shapes = ("whole.parquet", "data", "data/train-*.parquet", "data/train-{0..1}.parquet")
    for number, shape in enumerate(shapes):
        summary = convert(str(tmp_path / shape), str(tmp_path / str(number)))
        assert sides(tmp_path / str(number)) == CATS
        assert summary.records == 2


def test_parquet_of_image_structs(source: Path, tmp_path: Path):
    columns = {"prompt": ["a cat", "a dog"], "chosen": structs(1, 4), "rejected": structs(2, 3)}
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    convert(str(tmp_path / "some.parquet"), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS


def test_broken_parquet_is_named(source: Path, tmp_path: Path):
    path = tmp_path / "some.parquet"
    path.write_bytes(b"PAR1 and then something else")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        convert(str(path), str(tmp_path / "out"))
    pq.write_table(pa.table({"words": ["a cat"], "left": [b""]}), path)
    with pytest.raises(
        InputError, match="has the columns words, left and none of the expected ones"
    ):
        convert(str(path), str(tmp_path / "out"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"words", b"\xff\xfe\xfdds"))
    with pytest.raises(InputError, match="cannot be read as parquet"):
        convert(str(path), str(tmp_path / "out"))
    # a page that was overwritten costs the rest of its file, not the files before it
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pick_a_pic(), folder / "0.parquet")
    pq.write_table(pick_a_pic(), folder / "1.parquet", compression="zstd")
    data = bytearray((folder / "1.parquet").read_bytes())
    data[10:300] = b"x" * 290
    (folder / "1.parquet").write_bytes(data)
    summary = convert(str(folder), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS
    assert "1.parquet, row 1 cannot be read" in summary.broken.names[0]


def test_parquet_without_pyarrow_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "some.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[parquet\]"):
        convert(str(tmp_path / "some.parquet"), str(tmp_path / "out"))


def test_tars_one_a_folder_and_a_range(tmp_path: Path):
    (tmp_path / "tars").mkdir()
    pick_a_tar(tmp_path / "tars" / "00000.tar", "0", b"a cat", 1, b"1.0")
    pick_a_tar(tmp_path / "tars" / "00001.tar", "0", b"a dog", 3, b"0.0")
    for number, shape in enumerate(("tars", "tars/{00000..00001}.tar", "tars/*.tar")):
        convert(str(tmp_path / shape), str(tmp_path / str(number)))
        assert sides(tmp_path / str(number)) == CATS
    convert(str(tmp_path / "tars" / "00001.tar"), str(tmp_path / "one"))
    assert sides(tmp_path / "one") == CATS[1:]


def test_shards_of_this_library_are_a_source_too(source: Path, tmp_path: Path):
    convert(write(source, pair(1, 2), pair(4, 3, "a dog")), str(tmp_path / "first"))
    convert(str(tmp_path / "first"), str(tmp_path / "second"))
    assert sides(tmp_path / "second") == CATS


def test_broken_tars_are_named(tmp_path: Path):
    folder = tmp_path / "tars"
    folder.mkdir()
    pick_a_tar(folder / "0.tar", "first", b"a cat", 1, b"1.0")
    pick_a_tar(folder / "1.tar", "second", b"a dog", 3, b"0.0")
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[:700])  # in the middle of the first image
    pick_a_tar(folder / "2.tar", "third", b"\xff", 3, b"0.0")
    (folder / "3.tar").write_bytes((folder / "0.tar").read_bytes()[: 512 * 10 + 100])
    summary = convert(str(folder), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS[:1]
    assert "1.tar is truncated after its beginning" in summary.broken.names[0]
    assert "2.tar/third has a text that is not UTF-8" in summary.broken.names[1]
    assert "3.tar is truncated" in summary.broken.names[-1]
    with tarfile.open(folder / "0.tar", "w:gz") as tar:
        add(tar, "x.txt", b"x")
    with pytest.raises(InputError, match="cannot be read as a tar .*decompress"):
        convert(str(folder / "0.tar"), str(tmp_path / "none"))


def pair_folder(folder: Path, text: Callable[[str], Path]) -> Path:
    """Write a folder of pairs whose texts lie somewhere."""
    for side, numbers in (("chosen", (1, 4)), ("rejected", (2, 3))):
        (folder / side).mkdir(parents=True)
        for name, number in zip(("cat", "dog"), numbers, strict=True):
            (folder / side / f"{name}.png").write_bytes(picture(number))
    for name in ("cat", "dog"):
        text(name).parent.mkdir(exist_ok=True)
        text(name).write_text(f"a {name}\n")
    return folder


@pytest.mark.parametrize("place", ["chosen", "rejected", "prompts", "txt"])
def test_a_folder_of_chosen_and_rejected(tmp_path: Path, place: str):
    folder = tmp_path / "pairs"
    pair_folder(folder, lambda name: folder / place / f"{name}.txt")
    convert(str(folder), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS


def test_what_is_missing_in_a_folder_is_named(tmp_path: Path):
    folder = tmp_path / "pairs"
    pair_folder(folder, lambda name: folder / "txt" / f"{name}.txt")
    (folder / "chosen" / "bird.jpg").write_bytes(picture(0, form="JPEG"))
    (folder / "rejected" / "cow.jpg").write_bytes(picture(0, form="JPEG"))
    (folder / "txt" / "bird.txt").write_text("a bird")
    (folder / "txt" / "cow.txt").write_text("a cow")
    (folder / "chosen" / "dog.jpg").write_bytes(picture(0, form="JPEG"))
    for side in ("chosen", "rejected"):
        (folder / side / "hen.png").write_bytes(picture(0))
    summary = convert(str(folder), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS[:1]
    reasons = ("bird has no image under 'rejected'", "cow has no image under 'chosen'")
    reasons += ("dog has more than one chosen image", "hen has no text")
    assert [r in n for r, n in zip(reasons, summary.broken.names, strict=True)] == [True] * 4


def test_every_file_of_a_folder_becomes_a_pair_or_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "pairs"
    names = {"one.jfif": "JPEG", "two.JPE": "JPEG", "deep/er/three.PNG": "PNG", "four.gif": "GIF"}
    for number, side in enumerate(("chosen", "rejected")):
        for name, form in {**names, "five": "PNG"}.items():
            path = folder / side / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number, form=form))
            path.with_suffix(".txt").write_text(f"\ufeff{path.stem}\n", encoding="utf-16")
    (folder / "chosen" / ".DS_Store").write_bytes(b"left out")
    (folder / "chosen" / "Thumbs.db").write_bytes(b"named")
    summary = convert(str(folder), str(tmp_path / "out"))
    assert {text for text, *_ in sides(tmp_path / "out")} == {"one", "two", "three", "five"}
    odd = "read too: Thumbs.db, deep/er/three.PNG, five, four.gif, one.jfif, two.JPE"
    assert odd in capsys.readouterr().out
    reasons = ["Thumbs has no text", "four.gif is not a", "four.gif is not a"]
    for reason, name in zip(reasons, summary.broken.names, strict=True):
        assert reason in name


def test_formats_are_named_where_the_ending_does_not_tell(source: Path, tmp_path: Path):
    strange = tmp_path / "pairs.data"
    strange.write_text(json.dumps(pair()))
    with pytest.raises(InputError, match="name its format, for example --format jsonl"):
        convert(str(strange), str(tmp_path / "out"))
    assert convert(str(strange), str(tmp_path / "out"), format="jsonl").pairs == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl cannot be read .no such file"),
        ("gone-*.jsonl", "cannot be read .no such file"),
        ("{broken.jsonl", "cannot be read .no such file"),
        ("x" * 5000 + ".jsonl", "cannot be read .no such file"),
        ("p-{0..99999999999}.parquet", "cannot be read .no such file"),
        ("a\0.jsonl", "cannot be read .no such file"),
        ("", "contains neither chosen/ and rejected/ nor parquet nor tar files"),
    ],
)
def test_missing_sources_are_refused(tmp_path: Path, name: str, message: str):
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / name), str(tmp_path / "out"))


def test_json_that_breaks_off_costs_the_rest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = tmp_path / "one.json"
    one.write_text(json.dumps([pair(1, 2), pair(2, 3)])[:-9])
    summary = convert(str(one), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == CATS[:1]
    assert "one.json, record 2 is not JSON from '{" in summary.broken.names[0]
    monkeypatch.setattr(tables_module, "CHUNK", 2)  # what never ends is not read to the end
    one.write_text('["' + "x" * 1000)
    with pytest.raises(InputError, match="has no usable pair: 1 broken; .*is not JSON from '\"xxx"):
        convert(str(one), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_name_that_no_disk_takes_is_a_sentence(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read .no such file.; check the path"):
        convert(str(tmp_path / ("x" * 300)), str(tmp_path / "out"))


def test_an_endless_name_of_a_picture_is_shortened(source: Path, tmp_path: Path):
    records = [pair(), pair() | {"chosen": "ö" * 100_000}]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    [name] = summary.broken.names
    assert len(name) < 1100
    assert name.endswith("cannot be read (File name too long)")

"""Prompts out of every kind of file, and a sentence for each that holds none."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.prompts.base import digest
from lit_prefopt.prompts.files import PromptFile
from tests.helpers.server import serving
from tests.helpers.shards import cache_folder

__all__ = ["cache_folder"]  # fetched shards stay out of the user's folder

TEXTS = ["a red fox", "the sea, at night", "a red fox"]
RECORDS = [{"caption": text, "trainset_idx": i} for i, text in enumerate(TEXTS)]
FACTS = {text: {"category": "animals"} for text in TEXTS[:2]}
FILES = {
    "lines.txt": "\ufeffa red fox\r\n\r\n  the sea, at night \r\n \r\na red fox",
    "texts.json": json.dumps(["a red fox", "", "the sea, at night", " ", "a red fox"]),
    "records.json": json.dumps([*RECORDS, {"caption": None}, {"caption": " "}], indent=1),
    "lines.jsonl": "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    "parti.tsv": "Prompt\tCategory\na red fox\tA\n\tB\nthe sea, at night\tC\na red fox\tD\n",
    "table.CSV": 'id,prompt\n1,a red fox\n2,"the sea, at night"\n3,\n4,a red fox\n',
}


def texts(folder: Path, name: str, content: str | bytes, **options: Any) -> list[str]:
    """Return the prompts of a file with this content."""
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return PromptFile(str(folder / name), **options).texts()


@pytest.mark.parametrize("name", FILES)
def test_prompts_of_a_file(tmp_path: Path, name: str) -> None:
    """Their order and what occurs twice stay, what is empty goes."""
    assert texts(tmp_path, name, FILES[name]) == TEXTS
    assert texts(tmp_path, name, FILES[name], count=2) == TEXTS[:2]


def test_what_may_stand_in_a_line_does_not_end_it(tmp_path: Path) -> None:
    assert texts(tmp_path, "a.txt", "one\u2028two\x0cthree\nfour") == [
        "one\u2028two\x0cthree",
        "four",
    ]


def test_a_mapping_from_prompts_to_their_facts(tmp_path: Path) -> None:
    assert texts(tmp_path, "a.json", json.dumps(FACTS)) == TEXTS[:2]
    named = {f"{i:03d}": record for i, record in enumerate(RECORDS)}
    assert texts(tmp_path, "b.json", json.dumps(named), column="caption") == TEXTS


def test_a_stated_column_wins(tmp_path: Path) -> None:
    both = [{"prompt": "one", "caption": "two", "note": "three"}]
    for column, text in (("prompt", "one"), ("caption", "two"), ("note", "three")):
        assert texts(tmp_path, "a.json", json.dumps(both), column=column) == [text]
    assert texts(tmp_path, "a.tsv", FILES["parti.tsv"], column="Category") == list("ABCD")


@pytest.mark.parametrize(
    ("name", "content", "column", "sentence"),
    [
        ("a.txt", "\n \n", None, "a.txt contains no prompt; name a file or shards with prompts"),
        ("a.json", "[]", None, "contains no prompt"),
        ("a.json", "{}", None, "contains no prompt"),
        (
            "a.csv",
            "prompt,id\n,3\n",
            "prompt",
            "has no 'prompt', but 'id': set `column` to the one",
        ),
        ("a.json", '[{"prompt": ""}]', None, "contains no prompt"),
        ("a.csv", "", None, "contains no prompt"),
        ("a.txt", "a fox\na m\u00fcller".encode("latin-1"), None, "a.txt, line 2, is not UTF-8"),
        ("a.json", '["a fox"]'.encode("utf-16"), None, "a.json, line 1, is not UTF-8"),
        ("a.tsv", "prompt\na fox".encode("utf-16-le"), None, "a.tsv, line 1, is not UTF-8"),
        ("a.json", "a fox\n", None, "a.json is not JSON from 'a fox' on; fix the file"),
        ("a.json", '["one", "two"', None, "a.json ends before its list is closed; fix the file"),
        ("a.json", '["one", {', None, "is not JSON from '{' on"),
        ("a.json", '["one", 2]', None, "record 2 is neither a text nor a mapping"),
        ("a.jsonl", '{"prompt": "a"}\n{"pro', None, "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '"a fox"', None, "line 1 is not a mapping of names to values; fix the file"),
        ("a.csv", "prompt\na fox, red\n", None, "line 2 has 2 cells where the header names 1"),
        ("a.json", '[{"prompt": ["a"]}]', None, "record 1 has no text under 'prompt'"),
        (
            "a.csv",
            "x,y\n1,2\n",
            None,
            "no 'prompt' or 'caption' or .*, but 'x', 'y': set `column` to the one",
        ),
        (
            "a.json",
            '[{"x": "1"}, {"y": 2}]',
            "x",
            "record 2 has no 'x', but 'y': set `column` to the one",
        ),
        ("a.jsonl", '{"prompt": "a"}\n{"x": 1}', None, "line 2 has no 'prompt' or .*, but 'x'"),
        ("a.json", '["half a letter: \\ud83d"]', None, "record 1 has a text that is not UTF-8"),
        ("a.json", '[{"prompt": "a", "Caption": "b"}]', None, "record 1 has 'prompt', 'Caption'"),
        ("a.json", json.dumps({"1": RECORDS[0]}), None, "itself or contain one under 'caption'"),
        ("a.json", '["a fox"]', "prompt", "record 1 is a text and has no 'prompt'"),
        ("a.txt", "a fox", "prompt", "a.txt has no columns: omit `column`"),
        ("a.yaml", "- a fox", None, "a.yaml has an unknown file extension"),
        ("a", "a fox", None, "has an unknown file extension"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: str | bytes, column: str | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as told:
        texts(tmp_path, name, content, column=column)
    assert str(told.value).endswith(".")
    assert "\n" not in str(told.value)


def test_a_folder_of_anything_else(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    with pytest.raises(InputError, match="is a folder without pair shards; give a file of prompts"):
        PromptFile(str(tmp_path)).texts()
    (tmp_path / "pairs.tar").touch()
    with pytest.raises(InputError, match="has no index.json; make it with"):
        PromptFile(str(tmp_path)).texts()


def test_marks_of_byte_order_are_no_part_of_prompts(tmp_path: Path) -> None:
    one, two = ("a fox\n".encode("utf-8-sig"), "an owl\n".encode("utf-8-sig"))
    assert texts(tmp_path, "a.txt", one + two) == ["a fox", "an owl"]


def test_a_line_of_any_length_is_not_read(tmp_path: Path) -> None:
    content = f"a fox\n{'x' * 2_000_000}\n"
    with pytest.raises(InputError, match="a.txt, line 2, has more than 1000000 characters") as told:
        texts(tmp_path, "a.txt", content)
    assert len(str(told.value)) < 500
    wrong = b"a fox\n" * 300_000 + b"\xff\n"  # in the second piece of the file
    with pytest.raises(InputError, match="a.txt, line 300001, is not UTF-8"):
        texts(tmp_path, "a.txt", wrong)


@pytest.mark.parametrize("name", ["none.txt", "none.json", "none.csv"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} cannot be read \(No such file.*check the path"):
        PromptFile(str(tmp_path / name)).texts()
    with pytest.raises(InputError, match="There is no folder .*none; check the path"):
        PromptFile(str(tmp_path / "none")).texts()
    with pytest.raises(InputError, match="count is 0; give a number from 1"):
        PromptFile(name, count=0)


def test_files_and_shards_at_a_url(tmp_path: Path, make_shards: Callable[..., str]) -> None:
    make_shards(5, per_shard=2, name="pairs")
    name = "prompts.json?download=true"  # the server takes a query for a part of the name
    (tmp_path / name).write_text(FILES["records.json"])
    (tmp_path / "broken.json").write_text('["one", {')
    with serving(str(tmp_path)) as server:
        server.faults[name] = [503]
        assert PromptFile(f"{server.url}/{name}").texts() == TEXTS
        assert PromptFile(f"{server.url}/pairs").texts() == [f"prompt {i}" for i in range(5)]
        with pytest.raises(InputError, match=rf"^{server.url}/broken.json is not JSON"):
            PromptFile(f"{server.url}/broken.json").texts()
        with pytest.raises(InputError, match=rf"There is no {server.url}/none.txt; check the addr"):
            PromptFile(f"{server.url}/none.txt").texts()


def test_prompts_of_pair_shards(make_shards: Callable[..., str]) -> None:
    folder = make_shards(7, per_shard=3, broken={2: b"no image"})
    assert PromptFile(folder).texts() == [f"prompt {i}" for i in range(7)]
    assert PromptFile(f"{folder}/pairs-000001.tar", count=2).texts() == ["prompt 3", "prompt 4"]
    with pytest.raises(InputError, match="has no columns"):
        PromptFile(folder, column="prompt").texts()


def tar(folder: Path, *members: tuple[str, bytes]) -> None:
    """Write a shard of these members, and its index."""
    with tarfile.open(folder / "a.tar", "w") as file:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))
    index_shards(str(folder))


def test_a_prompt_may_stand_behind_the_images(tmp_path: Path) -> None:
    tar(
        tmp_path,
        *[("1.chosen.png", b"x" * 2000), ("1.TXT", b"one"), ("__note__", b"of webdataset")],
        *[("2.chosen.png", b"x"), ("2.txt", b" "), ("3.txt", b"three"), ("3.rejected.png", b"x")],
    )
    assert PromptFile(str(tmp_path)).texts() == ["one", "three"]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("2.json", b"{}"), r"has no prompt \(.txt\)"),
        (("2.txt", b"\xff\xfe"), "has a prompt that is not UTF-8"),
    ],
)
def test_a_sample_without_a_prompt_is_named(
    tmp_path: Path, member: tuple[str, bytes], reason: str
) -> None:
    tar(tmp_path, ("1.txt", b"one"), member, ("3.txt", b"three"))
    with pytest.raises(InputError, match=f"^a.tar, sample 1, {reason}; `lit-prefopt shards valid"):
        PromptFile(str(tmp_path)).texts()


@pytest.mark.parametrize(
    ("header", "reason"),
    [(b"000000000.", "sample 0, is not part of a tar"), (b"000000001.", "sample 1, has no prompt")],
)
def test_a_damaged_header_is_named(
    make_shards: Callable[..., str], header: bytes, reason: str
) -> None:
    path = Path(make_shards(3)) / "pairs-000000.tar"
    data = bytearray(path.read_bytes())
    begin = data.find(header)
    data[begin : begin + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        PromptFile(str(path.parent)).texts()


class Counted(io.FileIO):
    """Counts the bytes that are read."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        self.count += got
        return got


def test_images_are_not_read_for_prompts(tmp_path: Path) -> None:
    tar(tmp_path, ("1.chosen.png", b"x" * 20_000_000), ("1.txt", b"one"))
    reader, raw = ShardReader(read_index(tmp_path)), Counted(tmp_path / "a.tar")
    reader._files.values[0] = io.BufferedReader(raw)
    assert reader.text(0, 0) == "one"
    assert 0 < raw.count < 1_000_000


ENTRIES = [("a red fox", "animals"), ("the sea", "places"), ("a lamp", None)]
SETS = {
    "parti.tsv": "Prompt\tCategory\tChallenge\na red fox\tanimals\tBasic\n"
    "the sea\tplaces\tColour\na lamp\t\tBasic\n",
    "drawbench.csv": "Prompts,Category\na red fox,animals\nthe sea,places\na lamp,\n",
    "geneval.jsonl": '{"tag": "animals", "include": [], "prompt": "a red fox"}\n'
    '{"tag": "places", "include": [], "prompt": "the sea"}\n{"prompt": "a lamp"}\n',
    "facts.json": json.dumps(
        {"a red fox": {"category": "animals"}, "the sea": {"category": "places"}, "a lamp": {}}
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_categories(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(SETS[name])
    assert PromptFile(str(tmp_path / name)).entries() == ENTRIES
    assert PromptFile(str(tmp_path / name)).texts() == [text for text, _ in ENTRIES]


def test_a_column_of_categories_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(SETS["parti.tsv"])
    found = PromptFile(str(tmp_path / "a.tsv"), category="Challenge").entries()
    assert [entry.category for entry in found] == ["Basic", "Colour", "Basic"]
    with pytest.raises(
        InputError, match="no 'Style'.*set `category` to the one with the categories, or omit it"
    ):
        PromptFile(str(tmp_path / "a.tsv"), category="Style").texts()
    (tmp_path / "a.txt").write_text("a red fox")
    with pytest.raises(InputError, match="omit `category`"):
        PromptFile(str(tmp_path / "a.txt"), category="Style").texts()


def test_prompts_by_style(tmp_path: Path) -> None:
    """HPSv2's way: a file for each style, or one of all of them."""
    styles = {"anime": ["a red fox", "the sea"], "photo": ["a lamp"]}
    for style, listed in styles.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(listed))
    (tmp_path / "all.json").write_text(json.dumps(styles))
    expected = [(text, style) for style, listed in styles.items() for text in listed]
    files = [str(tmp_path / f"{style}.json") for style in styles]
    assert PromptFile(files).entries() == expected
    assert PromptFile(str(tmp_path / "all.json")).entries() == expected
    assert PromptFile(files, count=2).entries() == expected[:2]
    assert PromptFile(files[0]).entries()[0].category is None


def test_published_sets_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PromptFile("PartiPrompts").sources[0].endswith("/PartiPrompts.tsv")
    assert [Path(url).stem for url in PromptFile("hpsv2").sources] == [
        "anime",
        "concept-art",
        "paintings",
        "photo",
    ]
    monkeypatch.chdir(tmp_path)
    Path("geneval").mkdir()
    assert PromptFile("geneval").sources == ["geneval"]  # what is there comes first


def test_a_sheet_that_is_served_as_csv(tmp_path: Path) -> None:
    [address] = PromptFile("drawbench").sources
    name = address.rpartition("/")[2]
    assert name == "tq?tqx=out:csv#drawbench.csv"
    (tmp_path / "tq?tqx=out:csv").write_text(SETS["drawbench.csv"])  # all but the fragment is sent
    with serving(str(tmp_path)) as server:
        assert PromptFile(f"{server.url}/{name}").entries() == ENTRIES


def test_the_digest_is_that_of_a_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red fox\nthe sea\n")
    texts = PromptFile(str(tmp_path / "a.txt")).texts()
    assert digest(texts) == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert digest(texts) != digest(texts[:1])

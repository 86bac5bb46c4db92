"""Tars as other tools write them: dots in keys, members twice, marks, labels and captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import Columns, convert, validate
from tests.helpers.shards import picture
from tests.helpers.sources import samples, sides


def pack(path: Path, *members: tuple[str, bytes]) -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return str(path)


def sample(key: str, number: int = 1, text: bytes = b"a cat") -> list[tuple[str, bytes]]:
    return [
        (f"{key}.chosen.png", picture(number)),
        (f"{key}.rejected.png", picture(number + 1)),
        (f"{key}.txt", text),
    ]


def test_dots_in_keys_are_parts_of_the_keys(tmp_path: Path):
    keys = ["v1.0/img_v1.0_1", "v1.0/img_v1.0_2", "plain", "a.b.c"]
    members = [one for number, key in enumerate(keys) for one in sample(key, 2 * number)]
    members.insert(9, ("plain.model.txt", b"beside the others"))
    name = pack(tmp_path / "in" / "a.tar", *members)
    convert(name, str(tmp_path / "out"))
    assert [one[1] for one in sides(tmp_path / "out")] == [picture(n) for n in (0, 2, 4, 6)]
    cure = "the key of v1.0/img_v1.0_2.chosen.png has a dot.* by `lit-prefopt shards convert"
    with pytest.raises(InputError, match=cure):
        index_shards(str(tmp_path / "in"))


def test_a_member_twice_is_called_so(tmp_path: Path):
    members = [*sample("1"), ("2.chosen.png", picture(7)), *sample("2", 3)]
    name = pack(tmp_path / "in" / "a.tar", *members)
    summary = convert(name, str(tmp_path / "out"))
    assert len(samples(tmp_path / "out")) == 1
    assert summary.broken.names == [f"{name}/2 has chosen twice; keep one of the two members"]
    index_shards(str(tmp_path / "in"))
    report = validate(str(tmp_path / "in"))
    named = ["a.tar, sample 1, has chosen.png twice; keep one of the two members"]
    assert [one.replace("sample 1 ", "sample 1, ") for one in report.broken.names] == named


def test_a_member_that_was_appended_later_is_called_so(tmp_path: Path):
    name = pack(tmp_path / "in" / "a.tar", *sample("1"), *sample("2", 3), *sample("1", 5)[:1])
    summary = convert(name, str(tmp_path / "out"))
    assert len(samples(tmp_path / "out")) == 2
    assert "a.tar/1 comes a second time; its members are not adjacent" in summary.broken.names[0]
    with pytest.raises(InputError, match="sample 1 are not adjacent, or some were appended later"):
        index_shards(str(tmp_path / "in"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_before_a_text_are_no_part_of_the_prompt(tmp_path: Path, encoding: str):
    name = pack(tmp_path / "in" / "a.tar", *sample("1", text="a cat\r\n".encode(encoding)))
    convert(name, str(tmp_path / "out"))
    assert samples(tmp_path / "out")[0].text == "a cat"


def test_a_mark_in_shards_that_are_indexed_as_they_are(tmp_path: Path):
    pack(tmp_path / "in" / "a.tar", *sample("1", text=b"\xef\xbb\xbfa cat"))
    index_shards(str(tmp_path / "in"))
    reader = ShardReader(read_index(tmp_path / "in"))
    assert reader(0, 0).text == reader.text(0, 0) == "a cat"


def test_upper_case_cls_labels_and_captions_in_json(tmp_path: Path):
    images = [("1.JPG_0.PNG", picture(1)), ("1.jpg_1.Png", picture(2)), ("1.label_0.cls", b"0\n")]
    more = json.dumps({"caption": "a cat", "label_0": 1, "key": "1"}).encode()
    name = pack(tmp_path / "in" / "a.tar", *images, ("1.json", more))
    convert(name, str(tmp_path / "out"))
    assert sides(tmp_path / "out") == [("a cat", picture(2), picture(1))]


def test_a_bare_cls_is_a_label_only_by_name(tmp_path: Path):
    members = [("1.jpg_0.png", picture(1)), ("1.jpg_1.png", picture(2)), ("1.txt", b"x")]
    name = pack(tmp_path / "in" / "a.tar", *members, ("1.cls", b"0"))
    with pytest.raises(InputError, match="1 unlabelled; .*it has .*'cls'"):
        convert(name, str(tmp_path / "none"))
    convert(name, str(tmp_path / "out"), columns=Columns(label="cls"))
    assert sides(tmp_path / "out") == [("x", picture(2), picture(1))]


def test_the_members_that_exist_are_listed_and_broken_json_is_named(tmp_path: Path):
    members = [("1.jpg", picture(1)), ("1.cls", b"1"), ("1.json", b'{"prompt": "x", "liked": 1}')]
    name = pack(tmp_path / "in" / "a.tar", *members, ("2.txt", b"x"), ("2.json", b"{"))
    with pytest.raises(InputError) as caught:
        convert(name, str(tmp_path / "out"))
    assert "it has 'jpg', 'cls', 'json', 'prompt', 'liked'" in str(caught.value)
    assert "a.tar/2 has a .json that is not JSON" in str(caught.value)


def test_one_unreadable_tar_costs_no_other(tmp_path: Path):
    pack(tmp_path / "in" / "b.tar", *sample("1"))
    (tmp_path / "in" / "a.tar").write_bytes(b"\x1f\x8b" * 500)
    summary = convert(str(tmp_path / "in"), str(tmp_path / "out"))
    assert len(samples(tmp_path / "out")) == 1
    assert "a.tar cannot be read as a tar" in summary.broken.names[0]

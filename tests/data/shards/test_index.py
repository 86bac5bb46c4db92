"""The index: it finds every sample, of anybody's tar, and is refused when it does not fit."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from lit_prefopt.data.shards.index import index_shards, read_index, scan_shard, write_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from tests.helpers.shards import edited, members, picture, plain_tar


def test_scanning_finds_what_the_writer_noted(make_shards):
    folder = make_shards()
    written = (Path(folder) / "index.json").read_bytes()
    index_shards(folder)
    assert (Path(folder) / "index.json").read_bytes() == written


def test_somebody_elses_tar_is_indexed_and_read(tmp_path: Path):
    long = "a/very/" + "long/" * 40 + "name"  # needs an extra header in front of its members
    pairs = [*members("one", 1), ("README", b"no sample"), *members(long, 2), *members("x/3", 3)]
    plain_tar(tmp_path / "theirs.tar", pairs)
    index_shards(str(tmp_path))
    [shard] = read_index(tmp_path)
    read = [ShardReader([shard])(0, number) for number in range(3)]
    assert [sample.text for sample in read] == ["prompt 1", "prompt 2", "prompt 3"]
    assert read[1].name == f"theirs.tar/{long}"
    assert read[2].sides == [picture(103, form="JPEG"), picture(3, form="WEBP")]


def test_members_apart_from_their_sample_are_refused(tmp_path: Path):
    one, two = members("one"), members("two")
    plain_tar(tmp_path / "mixed.tar", [one[0], *two, *one[1:]])
    with pytest.raises(ValueError, match="sample one are not adjacent.*--sort=name"):
        index_shards(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.tar"]


def test_compressed_truncated_and_missing_tars_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"contains no \.tar file"):
        index_shards(str(tmp_path))
    with pytest.raises(ValueError, match="and decompress it"):
        scan_shard(plain_tar(tmp_path / "small.tar", members("one"), "w:gz"))
    whole = plain_tar(tmp_path / "whole.tar", members("one")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1200])
    with pytest.raises(ValueError, match="copy it again"):
        scan_shard(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    "name",
    [
        "../out.tar",
        "a/b.tar",
        "/etc/passwd",
        "..",
        "",
        "a\\b.tar",
        3,
        "\ud800",
        "\x1b[J",
        "x" * 256,
    ],
)
def test_a_shard_outside_of_the_folder_is_refused(make_shards, name):
    folder = edited(make_shards(), lambda index: index["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="not a plain file name"):
        read_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=2), "version 2 instead of 1"),
        (lambda index: index.update(shards="all"), "lists no shards"),
        (lambda index: index["shards"][0].pop("size"), "without name, size or offsets"),
        (lambda index: index["shards"][0].update(offsets=[0, 10**9]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(offsets=[512, 0]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(offsets=[[0], [1]]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(offsets=["a"]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(name="gone.tar"), "gone.tar, which is missing"),
        (lambda index: index["shards"][0].update(size=True), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(offsets=None), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(sizes=[[12, 10]]), "sizes of images that do not"),
        (lambda index: index["shards"][0].update(sizes=[12] * 6), "sizes of images that do not"),
        (lambda index: index["shards"][0].update(sizes=[[12, 0]] * 6), "sizes of images that do"),
        (lambda index: index["shards"][0].update(sizes=[[12, -1]] * 6), "sizes of images that do"),
        (lambda index: index["shards"][0].update(sizes=[[12, 16385]] * 6), "sizes of images that"),
        (lambda index: index["shards"][0].update(sizes=[[12.5, 1]] * 6), "sizes of images that do"),
        (lambda index: index["shards"][0].update(sizes=[[1, 1], [1]] * 3), "sizes of images that"),
        (lambda index: index["shards"][0].update(sizes="all"), "sizes of images that do not"),
        (lambda index: index["shards"][0].update(sizes=[["1", "1"]] * 6), "sizes of images that"),
        (lambda index: index["shards"][0].update(offsets=[True, 1]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(offsets=[0, 10**30]), "offsets that do not fit"),
        # an array of texts would take the longest one's memory for each of them
        (lambda index: index["shards"][0].update(offsets=["a" * 10**6] * 2), "offsets that do not"),
        (lambda index: index["shards"][0].update(size=10**400), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(size=-1, offsets=[]), "offsets that do not fit"),
        (lambda index: index["shards"][0].update(kind=["images"]), "kind .'images'. for"),
        (lambda index: index["shards"][0].update(kind="[/bold]" * 99), r"kind '.*\.\.\..*' for"),
        (lambda index: index.update(version={"a": "b" * 999}), r"has version .*\.\.\."),
        (lambda index: index.update(shards=[["name"]]), "without name, size or offsets"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_with_the_cure(make_shards, change, message):
    folder = edited(make_shards(), change)
    with pytest.raises(ValueError, match=f"{message}.*lit-prefopt shards index"):
        read_index(folder)


def test_a_changed_shard_and_a_missing_or_damaged_index_are_refused(make_shards):
    folder = Path(make_shards())
    with (folder / "pairs-000001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"pairs-000001\.tar, whose size has changed"):
        read_index(folder)
    (folder / "index.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="is not JSON; make it again"):
        read_index(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"has no index\.json; make it with"):
        read_index(folder)


def test_writing_leaves_the_old_index_after_an_error(make_shards, monkeypatch):
    folder = Path(make_shards())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_index(folder, read_index(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_sizes_are_those_of_the_best_sides_upright(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph = io.BytesIO()
    Image.new("RGB", (30, 20)).save(photograph, "JPEG", exif=turned)
    samples = [
        *members("a"),
        *[("b.txt", b"x"), ("b.rejected.png", picture(1)), ("b.chosen.png", picture(1, (7, 5)))],
        *[("c.txt", b"x"), ("c.chosen.JPG", photograph.getvalue()), ("c.rejected.png", b"")],
        *[("d.txt", b"x"), ("d.chosen.png", b"no image"), ("d.rejected.png", picture(1))],
    ]
    plain_tar(tmp_path / "a.tar", samples)
    index_shards(str(tmp_path))
    [shard] = read_index(tmp_path)
    assert shard.sizes is not None
    assert shard.sizes.tolist() == [[12, 10], [7, 5], [20, 30], [0, 0]]


def test_an_index_of_before_without_sizes_is_read(make_shards):
    def without(index: dict) -> None:
        for shard in index["shards"]:
            del shard["sizes"]

    folder = make_shards(8)
    assert [shard.sizes.tolist() for shard in read_index(folder)] == [
        [[12, 10]] * 6,
        [[12, 10]] * 2,
    ]
    old = read_index(edited(folder, without))
    assert [shard.sizes for shard in old] == [None, None]
    assert [len(shard.offsets) for shard in old] == [6, 2]


def test_an_index_that_is_nested_for_ever_and_an_absent_folder_are_refused(make_shards):
    folder = Path(make_shards())
    (folder / "index.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="is not JSON"):
        read_index(folder)
    with pytest.raises(InputError, match="There is no folder .*nowhere; check the path"):
        read_index(folder / "nowhere")

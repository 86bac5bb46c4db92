"""The writer: whole or absent, and the same bytes when made again."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from lit_prefopt.data.images import decode
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.writer import ShardWriter
from tests.helpers.shards import picture


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read(tmp_path: Path):
    pixels = np.random.RandomState(0).randint(0, 255, (9, 7, 3)).astype(np.uint8)
    mask = np.zeros((9, 7), np.uint8)
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("größer", picture(1, form="JPEG"), pixels, {"gap": 0.5}, mask)
        writer.add("", Image.fromarray(pixels), picture(2, form="WEBP"))
    reader = ShardReader(read_index(tmp_path / "out"))
    first, second = reader(0, 0), reader(0, 1)
    assert first.text == "größer"
    assert first.sides[0] == picture(1, form="JPEG")
    assert (np.array(decode(first.sides[1])) == pixels).all()
    assert first.meta == {"gap": 0.5}
    assert first.mask is not None
    assert (second.text, second.meta, second.mask) == ("", {}, None)
    with tarfile.open(tmp_path / "out/pairs-000000.tar") as tar:
        assert "000000001.chosen.png" in tar.getnames()
        assert "000000001.rejected.webp" in tar.getnames()


def test_webdataset_itself_reads_our_shards(make_shards):
    shard = f"{make_shards(5, per_shard=5)}/pairs-000000.tar"
    samples = list(webdataset.WebDataset([shard], shardshuffle=False))
    assert [sample["txt"] for sample in samples] == [f"prompt {n}".encode() for n in range(5)]


def test_made_again_the_bytes_are_the_same(make_shards):
    assert contents(Path(make_shards(name="a"))) == contents(Path(make_shards(name="b")))


def test_shards_are_cut_by_count_and_by_size(make_shards, tmp_path: Path):
    counts = [len(shard.offsets) for shard in read_index(make_shards(20, per_shard=6))]
    assert counts == [6, 6, 6, 2]
    with ShardWriter(tmp_path / "small", max_size=15_000) as writer:
        for number in range(9):
            writer.add("prompt", picture(number), picture(number))
    shards = read_index(tmp_path / "small")
    assert sum(len(shard.offsets) for shard in shards) == 9
    assert len(shards) > 1
    assert all(int(shard.offsets[-1]) < 15_000 for shard in shards)


def test_after_an_error_nothing_remains(tmp_path: Path):
    def interrupted() -> None:
        with ShardWriter(tmp_path / "out", max_count=1) as writer:
            writer.add("prompt", picture(1), picture(2))
            writer.add("prompt", picture(1), picture(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_while_writing_the_output_is_absent(tmp_path: Path):
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("prompt", picture(1), picture(2))
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((tmp_path / "out/index.json").read_text())["version"] == 1


def test_an_output_that_holds_something_is_refused_and_an_empty_one_taken(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("prompt", picture(1), picture(2))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="not empty; remove it"), ShardWriter(tmp_path / "out"):
        pass
    assert contents(tmp_path / "out") == before


def test_bytes_that_are_no_image_are_refused(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="chosen image of sample 0 is not a png"),
        ShardWriter(tmp_path / "out") as writer,
    ):
        writer.add("prompt", b"no image", picture(2))
    assert list(tmp_path.iterdir()) == []

"""Reading one sample: what is missing or dangerous is named, nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.reader import ShardReader, parse, unpack
from lit_prefopt.utils.filesystem import filesystem
from tests.helpers.shards import members, picture, plain_tar

GOOD = {"txt": b"", "chosen.png": b"1", "rejected.jpeg": b"2"}


def test_every_sample_is_found_in_any_order(make_shards):
    reader = ShardReader(read_index(make_shards(20, per_shard=6)))
    for shard, sample in [(3, 1), (0, 0), (2, 5), (0, 5)]:
        number = 6 * shard + sample
        read = reader(shard, sample)
        assert read.text == f"prompt {number}"
        assert read.name == f"pairs-{shard:06d}.tar/{number:09d}"
        assert read.sides == [picture(number + 100), picture(number + 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"txt": None}, "has no prompt"),
        ({"txt": b"\xff\xfe"}, "prompt that is not UTF-8"),
        ({"chosen.png": None}, "has no chosen image"),
        ({"rejected.jpeg": None}, "has no rejected image"),
        ({"json": b"{"}, "json that is not JSON"),
        ({"json": b"[" * 100_000}, "json that is not JSON"),
        ({"json": b"[1]"}, "json that is not a mapping"),
    ],
)
def test_what_a_sample_lacks_is_said(change, message):
    sample = {key: data for key, data in {**GOOD, **change}.items() if data is not None}
    with pytest.raises(BrokenSample, match=message):
        parse("a.tar/1", sample)


def test_an_empty_prompt_and_more_sides_are_fine():
    assert parse("a.tar/1", GOOD).text == ""
    sample = {"txt": b"", "first.png": b"1", "second.png": b"2", "third.png": b"3"}
    assert parse("a.tar/1", sample, ("first", "second", "third")).sides == [b"1", b"2", b"3"]


def test_a_pickle_in_a_shard_is_left_alone(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bombs = [(f"one.{kind}", pickle.dumps(Bomb())) for kind in ("pyd", "pkl", "pickle", "pth")]
    (tmp_path / "shards").mkdir()
    plain_tar(tmp_path / "shards" / "a.tar", members("one") + bombs)
    index_shards(str(tmp_path / "shards"))
    assert ShardReader(read_index(tmp_path / "shards"))(0, 0).text == "prompt 0"
    assert not (tmp_path / "exploded").exists()


def test_commands_and_unknown_places_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="would run a command"):
        read_index(f"pipe:touch {tmp_path}/ran")
    with pytest.raises(ValueError, match="is not on a file system that is read"):
        filesystem("nowhere://here")
    assert not list(tmp_path.iterdir())


def test_links_sparse_and_compressed_members_do_not_unfold(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("one.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in members("one")[1:]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    unpacked = unpack((tmp_path / "a.tar").read_bytes())
    assert "txt" not in unpacked
    compressed = plain_tar(tmp_path / "b.tar", members("one"), "w:gz").read_bytes()
    for data in (compressed, b"", b"junk" * 500):
        with pytest.raises(BrokenSample):
            unpack(data)


def test_remote_shards_are_read_by_their_bytes(make_shards):
    folder = make_shards(8, per_shard=4)
    remote = fsspec.filesystem("memory")
    remote.put(folder, "/remote", recursive=True)
    reader = ShardReader(read_index("memory://remote"))
    assert reader(1, 2).text == "prompt 6"
    changed = remote.cat_file("/remote/pairs-000000.tar") + b"more"
    remote.pipe_file("/remote/pairs-000000.tar", changed)
    with pytest.raises(
        ValueError, match="20484 bytes instead of 20480: it was cut short, or the shard has"
    ):
        reader(0, 0)


def test_a_shard_cut_off_after_the_start_stops_the_run(make_shards):
    folder = Path(make_shards(4, per_shard=4))
    reader = ShardReader(read_index(folder))
    shard = folder / "pairs-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        reader(0, 3)


def test_a_reader_travels_without_its_open_files(make_shards):
    reader = ShardReader(read_index(make_shards(4)))
    reader(0, 0)
    assert pickle.loads(pickle.dumps(reader))(0, 1).text == "prompt 1"

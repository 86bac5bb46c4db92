"""Members of a tar are taken as stored: nothing unfolds, and no size is believed that cannot be."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards import reader
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader, unpack
from lit_prefopt.data.shards.tar import is_plain, iterate_members
from lit_prefopt.prepare import convert, validate
from tests.helpers.shards import Maker, picture


def tar_of(
    members: dict[str, bytes], odd: str = "", headers: dict[str, str] | None = None
) -> bytes:
    """Return a tar in which one member has further headers."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.pax_headers = headers or {} if name == odd else {}
            tar.addfile(member, BytesIO(data))
    return buffer.getvalue()


def sample(key: str = "1") -> dict[str, bytes]:
    return {
        f"{key}.chosen.png": picture(2),
        f"{key}.rejected.png": picture(1),
        f"{key}.txt": b"a cat",
    }


SPARSE = [
    {"GNU.sparse.map": "0,5", "GNU.sparse.size": "1000000000000"},
    {"GNU.sparse.size": "1000000000000", "GNU.sparse.numblocks": "1"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"},
]
WRONG_SIZES = [
    {"GNU.sparse.realsize": "1000000000000"},
    {"GNU.sparse.realsize": "700"},
    {"size": "-1024"},
    {"size": "-4096"},
    {"size": "1000000000000"},
]


@pytest.mark.parametrize("headers", SPARSE, ids=["0.1", "0.0", "1.0"])
def test_sparse_members_are_not_plain_whatever_their_type(headers: dict[str, str]):
    members = {"1.txt": b"1\n0\n5\n", **sample("2")}
    with tarfile.open(fileobj=BytesIO(tar_of(members, "1.txt", headers)), mode="r:") as tar:
        found = [(member.name, is_plain(member)) for member in iterate_members(tar)]
    assert found == [("1.txt", False), *((name, True) for name in sample("2"))]


@pytest.mark.parametrize("headers", WRONG_SIZES, ids=str)
def test_sizes_that_cannot_be_are_refused(headers: dict[str, str], tmp_path: Path):
    data = tar_of(sample(), "1.chosen.png", headers)
    with pytest.raises(BrokenSample, match="is not part of a tar"):
        unpack(data)
    path = tmp_path / "1.tar"
    path.write_bytes(data)
    with pytest.raises(SystemExit, match="1.tar cannot be read as a tar"):
        main(["shards", "index", "--folder", str(tmp_path)])


def test_a_conversion_names_a_tar_with_a_wrong_size_and_keeps_the_others(tmp_path: Path):
    (tmp_path / "1.tar").write_bytes(tar_of(sample(), "1.chosen.png", {"size": "-1024"}))
    (tmp_path / "2.tar").write_bytes(tar_of(sample()))
    summary = convert(str(tmp_path), str(tmp_path / "out"))
    assert (summary.pairs, summary.broken.count) == (1, 1)
    assert "1.tar is truncated after its beginning" in summary.broken.names[0]
    assert "negative size" in summary.broken.names[0]


def test_a_sparse_member_is_listed_and_not_unfolded(tmp_path: Path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    members = sample() | {"1.mask.png": picture(3)}
    (folder / "1.tar").write_bytes(tar_of(members, "1.mask.png", SPARSE[0]))
    main(["shards", "index", "--folder", str(folder)])
    main(["shards", "validate", "--shards", str(folder)])
    said = " ".join(capsys.readouterr().out.split())
    assert "sparse" in said
    assert ShardReader(read_index(folder))(0, 0).mask is None


def test_a_sample_beyond_all_bounds_is_refused_before_it_is_read(
    make_shards: Maker, monkeypatch: pytest.MonkeyPatch
):
    folder = make_shards(2)
    monkeypatch.setattr(reader, "MAX_BYTES", 100)
    with pytest.raises(BrokenSample, match="sample 1, is too large with .* bytes"):
        ShardReader(read_index(folder))(0, 1)
    assert "sample 0 is too large with" in validate(folder).broken.names[0]

"""Five hundred damaged sets of shards: each is read, or ends in one sentence."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.data.shards.index import index_shards
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import data

STRANGE = [None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, float("nan"), "", "x", "../a", [], {}]
BLOCK = 512


def flip(content: bytearray, rng: random.Random) -> None:
    """Change a few bytes anywhere."""
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] = rng.randrange(256)


def damage_header(content: bytearray, rng: random.Random) -> None:
    """Change bytes of tar headers: names, sizes, kinds, checksums."""
    headers = [
        at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"
    ]
    start, width = rng.choice([(0, 100), (124, 12), (148, 8), (156, 1), (257, 8)])
    for at in rng.sample(headers, rng.randint(1, 3)):
        position = at + start + rng.randrange(width)
        content[position] = rng.choice([0, 32, 47, 48, 55, 57, 83, 88, 103, 120, 128, 255])


def damage_size(content: bytearray, rng: random.Random) -> None:
    """Give a header another size and a checksum that agrees."""
    headers = [
        at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"
    ]
    at = rng.choice(headers)
    size = rng.choice([0, 1, 511, 600, 4096, 10**6, 8**11 - 1])
    content[at + 124 : at + 136] = b"%011o\0" % size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])


def cut(content: bytearray, rng: random.Random) -> None:
    """Take the end away."""
    del content[rng.randrange(len(content)) :]


def shift(content: bytearray, rng: random.Random) -> None:
    """Move everything, at the same size."""
    by = rng.choice([1, BLOCK, 700, 3 * BLOCK])
    content[:] = content[by:] + content[:by]


def of_members(content: bytearray, rng: random.Random) -> None:
    """Rename, remove, double or empty a member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    at = rng.randrange(len(members))
    name, body = members[at]
    other = rng.choice(
        ["x", "", ".", "a/../b.txt", name.upper(), name + ".gz", "__meta__.json", "é.txt"]
    )
    replaced = [[(other, body)], [], [(name, body)] * 2, [(name, b"")], [(name, body[:9])]]
    members[at : at + 1] = rng.choice(replaced)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    content[:] = buffer.getvalue()


def of_index(content: bytearray, rng: random.Random) -> None:
    """Change one value of an index, or its bytes."""
    if rng.random() < 0.3:
        rng.choice([flip, cut])(content, rng)
        return
    index = json.loads(content)
    shard = rng.choice(index["shards"])
    places: list[tuple[Any, Any]] = [(index, key) for key in index] + [
        (shard, key) for key in shard
    ]
    places += [(shard[key], rng.randrange(len(shard[key]))) for key in ("offsets", "sizes")] * 3
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice([*STRANGE, 512, 1024, [1, 2]])
    content[:] = json.dumps(index).encode()


OF_SHARDS = [flip, damage_header, damage_size, cut, shift, of_members]


def damaged(folder: Path, rng: random.Random) -> None:
    """Damage a folder in one way, and make its index again half of the time."""
    change: Callable = rng.choice([*OF_SHARDS, of_index])
    path = folder / "index.json" if change is of_index else rng.choice(sorted(folder.glob("*.tar")))
    content = bytearray(path.read_bytes())
    change(content, rng)
    path.write_bytes(content)
    if change is not of_index and rng.random() < 0.5:
        index_shards(str(folder))


def outcome(folder: Path, rng: random.Random) -> str:
    """Read a folder as a run does; return what came of it."""
    options = {"broken_share": rng.choice([0, 0.3, 1]), "crop": "random", "flip": True}
    if rng.random() < 0.3:
        options |= {"aspect_buckets": True, "bucket_step": 4}
    try:
        module = data(str(folder), **options, batch_size=2, seed=rng.randrange(99))
        batches = list(module.train_dataloader())
    except InputError as error:
        return str(error)
    assert all(len(batch.images) == len(batch.keys) == 2 for batch in batches)
    return "read, with others in place" if module.broken else "read"


@pytest.mark.parametrize("part", range(5))
def test_damaged_shards_are_read_or_end_in_a_sentence(make_shards, tmp_path: Path, part, capsys):
    whole = Path(make_shards(8, per_shard=4))
    copy = tmp_path / "copy"
    outcomes = []
    for number in range(100 * part, 100 * (part + 1)):
        rng = random.Random(number)
        shutil.copytree(whole, copy)
        start = time.monotonic()
        try:
            damaged(copy, rng)
            before = {path.name: path.read_bytes() for path in copy.iterdir()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes.append(outcome(copy, rng))
        except InputError as error:  # the scan of the damaged tar
            outcomes.append(str(error))
            before = {path.name: path.read_bytes() for path in copy.iterdir()}
        except BaseException as error:
            raise AssertionError(f"number {number}") from error
        assert time.monotonic() - start < 10, number
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == before, number
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "train"], number
        shutil.rmtree(copy)
    assert all("\n" not in said and len(said) > 3 for said in outcomes)
    assert outcomes.count("read") > 5
    assert outcomes.count("read, with others in place") > 5
    assert len(set(outcomes)) > 20

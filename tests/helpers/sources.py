"""Sources of pairs as users have them, and readers of the converted shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import Sample, ShardReader
from tests.helpers.shards import picture


def pair(chosen: int = 1, rejected: int = 2, prompt: str = "a cat", **more: Any) -> dict[str, Any]:
    """Return a record of two images."""
    return {"prompt": prompt, "chosen": f"{chosen}.png", "rejected": f"{rejected}.png", **more}


def samples(folder: Path | str) -> list[Sample]:
    """Return all samples of a folder."""
    shards = read_index(folder)
    reader = ShardReader(shards)
    return [reader(s, n) for s, shard in enumerate(shards) for n in range(len(shard.offsets))]


def sides(folder: Path | str) -> list[tuple[str, bytes, bytes]]:
    """Return text, chosen and rejected image of all samples."""
    return [(sample.text, *sample.sides) for sample in samples(folder)]


def write(source: Path, *records: object) -> str:
    """Write records, a line each."""
    source.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return str(source)


def ranked(**more: Any) -> dict[str, Any]:
    """Return a record of four images."""
    return {"prompt": "a cat", "images": [f"{n}.png" for n in range(4)], **more}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the path of a file to be written, with images 0.png to 4.png beside it."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "source.jsonl"

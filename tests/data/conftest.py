"""Small real shards: the pixels of every pair tell its number."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.utils import filesystem as files

Maker = Callable[..., str]


def picture(number: int, size: tuple[int, int] = (12, 10), form: str = "PNG") -> bytes:
    """Return an encoded picture: left half as bright as its number, right half black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = number % 256
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that remote shards are kept in, none of the user's; retries are quick."""
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path / ".cache" / "lit-prefopt"


@pytest.fixture
def make_shards(tmp_path: Path) -> Maker:
    """Return a function that writes pairs; `broken` maps numbers to bytes for their bad side."""

    def make(
        samples: int = 20, per_shard: int = 6, name: str = "train", broken: dict | None = None
    ) -> str:
        folder = tmp_path / name
        with ShardWriter(folder, max_count=per_shard) as writer:
            for number in range(samples):
                writer.add(f"prompt {number}", picture(number + 100), picture(number + 10))
        for number, data in (broken or {}).items():
            _overwrite(folder, number, data)
        return str(folder)

    return make


def _overwrite(folder: Path, number: int, data: bytes) -> None:
    """Put bytes at the beginning of a stored chosen image; sizes stay as they are."""
    name = f"{number:09d}.chosen.png".encode()
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        at = content.find(name)
        if at >= 0:
            content[at + 512 : at + 512 + len(data)] = data
            tar.write_bytes(content)
            return
    raise AssertionError(f"no sample {number}")

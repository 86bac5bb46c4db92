"""Small real shards: the pixels of every pair tell its number."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
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


def members(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    """Return the members of one pair."""
    return [
        (f"{key}.txt", f"prompt {number}".encode()),
        (f"{key}.chosen.jpg", picture(number + 100, form="JPEG")),
        (f"{key}.rejected.webp", picture(number, form="WEBP")),
    ]


def plain_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write a tar as a person would."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def edited(folder: str, change) -> str:
    """Change the index of a folder by hand."""
    path = Path(folder) / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return folder


def png_header(width: int, height: int) -> bytes:
    """Return a png that promises a size and holds nearly nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body

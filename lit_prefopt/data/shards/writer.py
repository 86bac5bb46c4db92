"""Writing shards: whole or not at all, and byte for byte the same when made again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from lit_prefopt.data.images import FORMATS, BrokenSample, Size, open_image, upright_size
from lit_prefopt.data.shards.format import IMAGES, Shard
from lit_prefopt.data.shards.index import write_index
from lit_prefopt.errors import InputError

SHARD = "pairs-{:06d}.tar"
Side = bytes | Image.Image | NDArray[np.uint8]


class ShardWriter:
    """Writes pairs into a new folder of shards, which appears when all is written.

    Args:
        output: The folder to be made.
        max_count: Most samples in a shard.
        max_size: Most bytes in a shard; a single larger sample gets a shard of its own.
        image_format: How images that come decoded are stored: png, jpg or webp.
        kind: What the samples hold, `images` or `latents`.
    """

    def __init__(
        self,
        output: str | Path,
        max_count: int = 10_000,
        max_size: int = 1_000_000_000,
        image_format: str = "png",
        kind: str = IMAGES,
    ) -> None:
        self.output, self.kind = Path(output), kind
        self.max_count, self.max_size, self.image_format = max_count, max_size, image_format
        self.samples = 0
        self.shards: list[Shard] = []
        self._offsets: list[int] = []
        self._sizes: list[Size] = []  # of the best sides
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        """Make the temporary folder beside the output."""
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(f"{self.output} exists and is not empty; remove it or name another.")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        name = f".{self.output.name}."
        # a sibling, hence on the same file system: the rename at the end is atomic
        self.folder = Path(tempfile.mkdtemp(prefix=name, dir=self.output.parent))
        self.folder.chmod(0o755)  # mkdtemp's folders are for their owner alone
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the folder and give it its name, or remove it after an error."""
        try:
            self._close_shard()
            if kind is None:
                write_index(self.folder, self.shards)
                os.rename(self.folder, self.output)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self,
        prompt: str,
        chosen: Side,
        rejected: Side,
        meta: Mapping[str, Any] | None = None,
        mask: Side | None = None,
    ) -> None:
        """Append a pair.

        Args:
            prompt: The text that both images were made for.
            chosen: The better image: encoded as png, jpg or webp, or decoded.
            rejected: The worse image.
            meta: What else is known about the pair; goes to its .json.
            mask: White where the two sides are meant to differ.
        """
        sample = {"txt": prompt.encode()}
        sizes = []
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            data, extension = self._encode(name, side)
            sample[f"{name}.{extension}"] = data
            sizes.append(upright_size(data))
        if meta:
            sample["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        if mask is not None:
            # the mask's name says png, so another encoding is turned into one
            sample["mask.png"] = encode(_decoded(mask), "png")[0]
        self.add_members(sample, sizes[0])

    def add_members(
        self, members: Mapping[str, bytes], best: Size, shard: int | None = None
    ) -> None:
        """Append a sample of whatever kind.

        Args:
            members: Bytes by extension, in the order in which they are written.
            best: Width and height of the best side's picture; (0, 0) where they are not known.
            shard: Number of its shard, however large that gets; they must rise. Where it is not
                given, shards are as large as they may be.
        """
        self._write({"__key__": f"{self.samples:09d}", **members}, best, shard)

    def _encode(self, name: str, side: Side) -> tuple[bytes, str]:
        try:
            return encode(side, self.image_format)
        except BrokenSample as error:
            where = f"The {name} image of sample {self.samples}"
            raise InputError(f"{where} {error}; repair it or leave the pair out.") from error

    def _write(self, sample: dict[str, Any], best: Size, shard: int | None) -> None:
        if self._file is not None and self._is_full(sample, shard):
            self._close_shard()
        if self._file is None:
            self._open_shard(len(self.shards) if shard is None else shard)
        self._offsets.append(self._tar.tarstream.offset)
        self._sizes.append(best)
        self._tar.write(sample)
        self.samples += 1

    def _is_full(self, sample: Mapping[str, Any], shard: int | None) -> bool:
        if shard is not None:
            return shard_number(self._name) != shard
        # a header of 512 bytes and up to 511 of padding for each member
        size = sum(len(data) + 1023 for key, data in sample.items() if key != "__key__")
        full = len(self._offsets) >= self.max_count
        return bool(full or self._tar.tarstream.offset + size > self.max_size)

    def _open_shard(self, number: int) -> None:
        self._name = SHARD.format(number)
        self._file = open(self.folder / self._name, "wb")  # noqa: SIM115 - closed by _close_shard
        # nothing of the machine or the hour goes into a shard
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, mtime=0, user="", group="", mode=0o644
        )

    def _close_shard(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            self._tar.close()
        size = (self.folder / self._name).stat().st_size
        offsets = np.asarray(self._offsets, np.int64)
        sizes = np.asarray(self._sizes, np.int32).reshape(-1, 2)
        self.shards.append(Shard(self._name, size, offsets, sizes=sizes, kind=self.kind))
        self._offsets, self._sizes = [], []


def shard_number(name: str) -> int:
    """Return the number in the name that a writer gave a shard."""
    return int(name.removeprefix("pairs-").removesuffix(".tar"))


def encode(image: Side, image_format: str = "png") -> tuple[bytes, str]:
    """Return an image's bytes and extension; bytes that are encoded already stay as they are.

    Args:
        image: The image: encoded, or decoded as (H, W, 3) uint8 or as PIL holds it.
        image_format: How a decoded image is encoded: png, jpg or webp.
    """
    if isinstance(image, bytes):
        return image, FORMATS[str(open_image(image).format)]
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    formats = {extension: name for name, extension in FORMATS.items()}
    if image_format not in formats:
        raise InputError(f"{image_format} is no known format; take one of {', '.join(formats)}.")
    buffer = BytesIO()
    image.save(buffer, formats[image_format], quality=95, lossless=False)
    return buffer.getvalue(), image_format


def _decoded(image: Side) -> Side:
    return open_image(image).convert("L") if isinstance(image, bytes) else image

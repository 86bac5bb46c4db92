"""Write shards atomically and reproducibly, byte for byte."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_prefopt.data.images import FORMATS, BrokenSample, Size, decode, open_image, upright_size
from lit_prefopt.data.shards.format import IMAGES, MOST_SIDES, SIDES, Shard
from lit_prefopt.data.shards.index import write_index
from lit_prefopt.data.shards.sides import side_names
from lit_prefopt.data.shards.tar import write_members
from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import temporary_folder
from lit_prefopt.utils.os_errors import name_output

SHARD = "pairs-{:06d}.tar"
Side = bytes | Image.Image | NDArray[np.uint8]


class ShardWriter:
    """Writes samples into a new folder of shards, which appears once it is complete.

    Args:
        output: Output folder.
        max_count: Maximum number of samples in a shard.
        max_size: Maximum size of a shard in bytes; a single larger sample gets its own shard.
        image_format: Format of images that are given decoded: png, jpg or webp.
        kind: Kind of the samples, `images` or `latents`.
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
        self._sides: list[int] = []  # numbers of sides
        self._file: BinaryIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        """Create the temporary folder beside the output."""
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(f"{self.output} exists and is not empty; remove it or choose another.")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        # a sibling, hence on the same file system: the rename at the end is atomic
        self.folder = self._stack.enter_context(temporary_folder(self.output))
        self._stack.enter_context(name_output(self.output, self.folder))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete and rename the folder, or remove it after an error."""
        with self._stack:  # removes the folder, and names the output in errors
            self._close_shard()
            if error is not None:
                raise error
            write_index(self.folder, self.shards)
            os.rename(self.folder, self.output)

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
            prompt: The prompt of both images.
            chosen: The better image: encoded as png, jpg or webp, or decoded.
            rejected: The worse image.
            meta: Further data of the pair, stored in its .json.
            mask: White where the two sides should differ.
        """
        self.add_sides(prompt, (chosen, rejected), meta, mask)

    def add_sides(
        self,
        prompt: str,
        sides: Sequence[Side],
        meta: Mapping[str, Any] | None = None,
        mask: Side | None = None,
    ) -> None:
        """Append a sample of any number of images: a single one, a pair, or a ranked list.

        Args:
            prompt: The prompt of all images.
            sides: The images, the best first: encoded as png, jpg or webp, or decoded.
            meta: Further data of the sample, stored in its .json. That of a single image has the
                `label` 1 if it is liked and 0 if not.
            mask: White where the sides should differ.
        """
        if not 1 <= len(sides) <= MOST_SIDES:
            raise InputError(
                f"Sample {self.samples} has {len(sides)} images; give 1 to {MOST_SIDES}."
            )
        sample = {"txt": prompt.encode()}
        sizes = []
        for name, side in zip(side_names(len(sides)), sides, strict=True):
            data, extension = self._encode(name, side)
            sample[f"{name}.{extension}"] = data
            sizes.append(upright_size(data))
        if meta:
            sample["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        if mask is not None:
            # masks are stored as png, so other encodings are converted
            sample["mask.png"] = encode(_decoded(mask), "png")[0]
        self.add_members(sample, sizes[0], sides=len(sides))

    def add_members(
        self,
        members: Mapping[str, bytes],
        best: Size,
        shard: int | None = None,
        sides: int = len(SIDES),
    ) -> None:
        """Append a sample of any kind.

        Args:
            members: Bytes by extension, in the order of writing.
            best: Width and height of the best side; (0, 0) if unknown.
            shard: Number of its shard, in ascending order, without a size limit. By default
                shards are filled up to their limits.
            sides: Number of its images.
        """
        self._write(members, best, shard, sides)

    def _encode(self, name: str, side: Side) -> tuple[bytes, str]:
        try:
            return encode(side, self.image_format)
        except BrokenSample as error:
            where = f"The {name} image of sample {self.samples}"
            raise InputError(f"{where} {error}; repair or remove the pair.") from error

    def _write(
        self, members: Mapping[str, bytes], best: Size, shard: int | None, sides: int
    ) -> None:
        if self._file is not None and self._is_full(members, shard):
            self._close_shard()
        if self._file is None:
            self._open_shard(len(self.shards) if shard is None else shard)
        self._offsets.append(self._tar.offset)
        self._sizes.append(best)
        self._sides.append(sides)
        write_members(self._tar, f"{self.samples:09d}", members)
        self.samples += 1

    def _is_full(self, members: Mapping[str, bytes], shard: int | None) -> bool:
        if shard is not None:
            return shard_number(self._name) != shard
        # a header of 512 bytes and up to 511 bytes of padding per member
        size = sum(len(data) + 1023 for data in members.values())
        full = len(self._offsets) >= self.max_count
        return bool(full or self._tar.offset + size > self.max_size)

    def _open_shard(self, number: int) -> None:
        self._name = SHARD.format(number)
        self._file = open(self.folder / self._name, "wb")  # noqa: SIM115 - closed by _close_shard
        self._tar = tarfile.open(fileobj=self._file, mode="w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _close_shard(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            self._tar.close()
        size = (self.folder / self._name).stat().st_size
        offsets = np.asarray(self._offsets, np.int64)
        sizes = np.asarray(self._sizes, np.int32).reshape(-1, 2)
        sides = np.asarray(self._sides, np.int32)
        shard = Shard(self._name, size, offsets, sizes=sizes, kind=self.kind, sides=sides)
        self.shards.append(shard)
        self._offsets, self._sizes, self._sides = [], [], []


def shard_number(name: str) -> int:
    """Return the number in a shard's name."""
    return int(name.removeprefix("pairs-").removesuffix(".tar"))


def encode(image: Side, image_format: str = "png") -> tuple[bytes, str]:
    """Encode an image and return bytes and extension; encoded bytes are returned unchanged.

    Args:
        image: The image: encoded, or decoded as (H, W, 3) uint8 or a PIL image.
        image_format: Format for a decoded image: png, jpg or webp.
    """
    if isinstance(image, bytes):
        return image, FORMATS[str(open_image(image).format)]
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    formats = {extension: name for name, extension in FORMATS.items()}
    if image_format not in formats:
        raise InputError(f"{image_format} is an unknown format; use one of {', '.join(formats)}.")
    buffer = BytesIO()
    image.save(buffer, formats[image_format], quality=95, lossless=False)
    return buffer.getvalue(), image_format


def _decoded(image: Side) -> Side:
    return decode(image, "L") if isinstance(image, bytes) else image

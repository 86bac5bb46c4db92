"""Format of shards and of their index.json, which is checked when it is parsed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_prefopt.data.images import MAX_SIDE
from lit_prefopt.errors import InputError, quoted

INDEX = "index.json"
STAGE_FOLDER = "stage-{}"  # folders of `shards stages`, counted from 1
GENERATION_FILE = (
    "generation.json"  # beside it in a generator's output: the settings that determine the content
)
VERSION = 1
SIDES = ("chosen", "rejected")  # of a pair, best side first; see `sides.py` for all samples
MOST_SIDES = 99  # images of a ranked list
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
IMAGES, LATENTS = "images", "latents"  # kinds of samples
CACHED = "cache.safetensors"  # extension of the member with latents instead of images


class Shard(NamedTuple):
    """One tar, with the offsets of its samples and the sizes of their images."""

    name: str  # a file name without a folder
    size: int  # of the tar, in bytes
    offsets: NDArray[np.int64]  # (samples,)
    folder: str = ""  # path or URL of the folder
    sizes: NDArray[np.int32] | None = None  # (samples, 2): see `dump`; None if unknown
    kind: str = IMAGES  # or LATENTS
    sides: NDArray[np.int32] | None = None  # (samples,): numbers of images; pairs where None

    def count_of(self, sample: int) -> int:
        """Return the number of images of a sample."""
        return len(SIDES) if self.sides is None else int(self.sides[sample])

    @property
    def side_counts(self) -> set[int]:
        """Numbers of images that its samples have: 2 for pairs."""
        if self.sides is None:
            return {len(SIDES)} if len(self.offsets) else set()
        return {int(count) for count in np.unique(self.sides)}

    @property
    def url(self) -> str:
        """Path or URL of the tar."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    def span(self, sample: int) -> tuple[int, int]:
        """Return the first byte of a sample and the one after its last."""
        end = self.offsets[sample + 1] if sample + 1 < len(self.offsets) else self.size
        return int(self.offsets[sample]), int(end)


def dump(shards: Iterable[Shard]) -> str:
    """Serialize an index.

    It is JSON: `version` (1) and `shards`, each with `name`, `size`, `offsets` and, if known,
    `sizes`: [width, height] of each sample's upright best side, [0, 0] for a broken one. `sizes`
    was added later; an index without them is valid. Shards of cached latents have
    `"kind": "latents"`. Shards of other samples than pairs have `sides`: how many images each
    sample has, one number if all have the same.
    """
    rows = ",\n".join(json.dumps(_row(shard), separators=(",", ":")) for shard in shards)
    return f'{{"version":{VERSION},"shards":[\n{rows}\n]}}\n'


def parse(folder: str, text: bytes) -> list[Shard]:
    """Parse an index and check all its numbers.

    Args:
        folder: Path or URL of the index's folder.
        text: The content of index.json.
    """
    try:
        # row by row into arrays: ten million samples as Python ints would take gigabytes
        content = json.loads(text, object_hook=_with_arrays)
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise stale_index_error(folder, "is not JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise stale_index_error(folder, "lists no shards")
    if content.get("version") != VERSION:
        raise stale_index_error(
            folder, f"has version {quoted(content.get('version'))} instead of {VERSION}"
        )
    return [_parse_row(folder, row) for row in content["shards"]]


def stale_index_error(folder: str, what: str) -> InputError:
    """Return the error for an index that does not match its folder."""
    return InputError(
        f"{folder}/{INDEX} {what}; make it again with `lit-prefopt shards index --folder "
        f"{shlex.quote(folder)}`."
    )


def _row(shard: Shard) -> dict[str, Any]:
    row = {"name": shard.name, "size": shard.size, "offsets": shard.offsets.tolist()}
    if shard.kind != IMAGES:
        row["kind"] = shard.kind
    counts = shard.side_counts
    if shard.sides is not None and counts != {len(SIDES)}:
        row["sides"] = shard.sides.tolist() if len(counts) > 1 else min(counts)
    return row if shard.sizes is None else {**row, "sizes": shard.sizes.tolist()}


def _with_arrays(row: dict[str, Any]) -> dict[str, Any]:
    for key in ("offsets", "sizes", "sides"):
        if isinstance(row.get(key), list):
            # a ragged row, or one of other types, stays a list, which is rejected later
            flat = chain.from_iterable(n if type(n) is list else (n,) for n in row[key])
            with suppress(ValueError, OverflowError):
                if set(map(type, flat)) <= {int}:
                    row[key] = np.asarray(row[key])
    return row


def _parse_row(folder: str, row: Any) -> Shard:
    try:
        name, size, offsets, sizes = row["name"], row["size"], row["offsets"], row.get("sizes")
    except (TypeError, KeyError, AttributeError) as error:
        raise stale_index_error(folder, "has a shard without name, size or offsets") from error
    if not _is_file_name(name):
        raise stale_index_error(
            folder, f"has the shard {quoted(name)}, which is not a plain file name"
        )
    if not _rising(offsets, size):
        raise stale_index_error(folder, f"has offsets that do not fit {name}")
    if sizes is not None and not _plausible(sizes, len(offsets)):
        raise stale_index_error(folder, f"has sizes of images that do not fit {name}")
    if sizes is not None:
        sizes = sizes.astype(np.int32).reshape(-1, 2)
    kind = row.get("kind", IMAGES)
    if kind not in (IMAGES, LATENTS):
        raise stale_index_error(folder, f"has the kind {quoted(kind)} for {name}, which is unknown")
    sides = _parse_sides(folder, name, row.get("sides"), len(offsets))
    return Shard(name, size, offsets.astype(np.int64), folder, sizes, kind, sides)


def _parse_sides(folder: str, name: str, sides: Any, samples: int) -> NDArray[np.int32] | None:
    if sides is None:
        return None
    if type(sides) is int and samples:
        sides = np.full(samples, np.clip(sides, 0, MOST_SIDES + 1))
    plain = isinstance(sides, np.ndarray) and sides.dtype == np.int64 and sides.shape == (samples,)
    if not plain or not ((sides >= 1) & (sides <= MOST_SIDES)).all():
        raise stale_index_error(folder, f"has numbers of sides that do not fit {name}")
    return sides.astype(np.int32)


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\"):
        return False
    # no control characters, no lone surrogates, and not longer than file systems allow
    plain = all(ord(char) >= 32 and not 0xD800 <= ord(char) < 0xE000 for char in name)
    return plain and len(name.encode()) <= 255


def _rising(offsets: Any, size: Any) -> bool:
    if not isinstance(offsets, np.ndarray) or type(size) is not int or not 0 <= size < 2**63:
        return False
    if offsets.shape == (0,):
        return True
    if offsets.ndim != 1 or offsets.dtype != np.int64:
        return False
    return bool((np.diff(offsets) > 0).all() and offsets[0] >= 0 and offsets[-1] < size)


def _plausible(sizes: Any, samples: int) -> bool:
    if not isinstance(sizes, np.ndarray):
        return False
    if not samples:
        return sizes.shape == (0,)
    if sizes.shape != (samples, 2) or sizes.dtype != np.int64:
        return False
    known = (sizes > 0).all(axis=1) | (sizes == 0).all(axis=1)
    return bool(known.all() and (sizes <= MAX_SIDE).all())

"""Check one stored sample, more strictly than training does."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_prefopt.data.images import BrokenSample, decode
from lit_prefopt.data.shards.format import Shard
from lit_prefopt.data.shards.reader import Sample, bounded_span, parse, unpack
from lit_prefopt.data.shards.sides import is_like, is_side, scores_in
from lit_prefopt.data.shards.tar import is_plain, iterate_members, split_name
from lit_prefopt.errors import InputError, quoted
from lit_prefopt.prepare.image_checks import CheckedImage, check, digest
from lit_prefopt.prepare.prompt_length import exceeds_context
from lit_prefopt.utils.filesystem import filesystem

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prefopt.data.latents.manifest import LatentSet

KNOWN = {"txt", "json", "mask.png"}  # members that are no image
SAFE = ".safetensors"
RANGES = {"label": 1.0, "weight": 3e38}  # from 0 to this


class SampleLocation(NamedTuple):
    """Location of a sample: shard, number and byte range."""

    shard: Shard
    sample: int
    start: int  # first byte; 0 for the first sample, to include the head of the tar
    stop: int
    latents: LatentSet | None = None  # manifest of the set of a cached sample


class SampleFindings(NamedTuple):
    """Findings of a sample's checks."""

    name: str
    broken: str = ""  # why training would replace it by another one
    odd: tuple[str, ...] = ()  # unexpected members
    empty: bool = False  # the text
    long: bool = False  # the text, surely longer than CLIP's context
    transparent: bool = False  # a side
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of each side, best side first
    digest: bytes = b""  # of text and sides
    identical: bool = False
    label: float = 1.0
    scored: bool = False  # whether each side has a score

    @property
    def liked(self) -> bool:
        """Whether it is a single image that is liked."""
        return len(self.sizes) == 1 and self.label == 1


def latent_set(index: Sequence[Shard]) -> LatentSet:
    """Return the common settings of cached shards, checked against their files.

    Args:
        index: Cached shards.
    """
    from lit_prefopt.data.latents.latent_reader import LatentReader
    from lit_prefopt.data.latents.manifest import LatentSet  # imports torch

    return LatentSet.from_shards(LatentReader([*index]).check().shards)


def places(index: Sequence[Shard], latents: LatentSet | None) -> Iterator[SampleLocation]:
    """Yield the location of every sample in the shards.

    Args:
        index: The shards.
        latents: The samples' common settings, if they are cached.
    """
    for shard in index:
        for sample in range(len(shard.offsets)):
            start, stop = shard.span(sample)
            yield SampleLocation(shard, sample, start if sample else 0, stop, latents)


def look(place: SampleLocation) -> SampleFindings:
    """Check a stored sample and return the findings; only images are opened."""
    name = f"{place.shard.name}, sample {place.sample}"
    try:
        bounded_span(place.shard, place.sample)
    except BrokenSample as error:
        return SampleFindings(name, f"{name} {error}")
    data = _bytes(place)
    odd = odd_members(place.shard.name, data)
    try:
        offset = place.shard.span(place.sample)[0] - place.start
        members = unpack(data[offset:])
        name = f"{place.shard.name}/{members['__key__']}"
        if place.latents is not None:
            return _check_cached_sample(name, members, place.latents, odd)
        sample = parse(name, members)
        sides = zip(sample.names, sample.sides, strict=True)
        files = [_side(side, image) for side, image in sides]
        _check_rest(sample)
    except BrokenSample as error:
        return SampleFindings(name, f"{name} {error}", odd)
    digests = [file.digest for file in files]
    return SampleFindings(
        name,
        odd=odd,
        empty=not sample.text.strip(),
        long=exceeds_context(sample.text),
        transparent=any(file.transparent for file in files),
        sizes=tuple(file.size for file in files),
        digest=digest(sample.text.encode(), *digests),
        identical=len(set(digests)) < len(digests),
        **_rated(sample.meta, len(files)),
    )


def _rated(meta: Mapping[str, Any], sides: int) -> dict[str, Any]:
    return {"label": meta.get("label", 1.0), "scored": scores_in(meta, sides) is not None}


def _check_cached_sample(
    name: str, members: Mapping[str, Any], latents: LatentSet, odd: tuple[str, ...]
) -> SampleFindings:
    """Check a cached sample and return the findings."""
    from lit_prefopt.data.latents.latent_reader import parse_latents  # imports torch

    sample = parse_latents(name, members)
    _check_numbers(sample.meta, sample.side_count)
    latents.check(sample)
    sides = [_bytes_of(side) for side in sample.tensors["mean"].unbind(1)]
    return SampleFindings(
        name,
        odd=odd,
        empty=not sample.text.strip(),
        long=exceeds_context(sample.text),
        sizes=tuple(sample.sizes),
        digest=digest(sample.text.encode(), *sides),
        identical=len(set(sides)) < len(sides),
        **_rated(sample.meta, sample.side_count),
    )


def _bytes_of(tensor: Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def odd_members(shard: str, data: bytes) -> tuple[str, ...]:
    """Return the unexpected members of a shard, such as pickles and links."""
    names = []
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            for member in iterate_members(tar):
                kind = split_name(member.name)[1] or ""
                plain = is_plain(member)
                if not plain and not member.isdir():
                    names.append(f"{shard}/{member.name} is a link, a device or sparse")
                elif plain and not (kind in KNOWN or is_side(kind) or kind.endswith(SAFE)):
                    names.append(f"{shard}/{member.name}")
    except tarfile.TarError:
        return tuple(names)  # the sample is broken, which is reported when it is unpacked
    return tuple(names)


def _bytes(place: SampleLocation) -> bytes:
    fs, path = filesystem(place.shard.url)
    try:
        data: bytes = fs.cat_file(path, start=place.start, end=place.stop)
    except OSError as error:
        raise InputError(f"{place.shard.url} cannot be read ({error}); check the path.") from error
    return data


def _side(name: str, data: bytes) -> CheckedImage:
    try:
        return check(data)
    except BrokenSample as error:
        raise BrokenSample(f"{name} {error}") from error


def _check_rest(sample: Sample) -> None:
    """Check mask and metadata; raise BrokenSample if training would."""
    if sample.mask is not None:
        try:
            decode(sample.mask, "L")
        except BrokenSample as error:
            raise BrokenSample(f"mask {error}") from error
    _check_numbers(sample.meta, sample.side_count)


def _check_numbers(meta: Mapping[str, Any], sides: int) -> None:
    if sides == 1 and not is_like(meta):
        raise BrokenSample("is a single image without the label 1 (liked) or 0 (disliked)")
    for name, most in RANGES.items():
        value = meta.get(name, 1.0)
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise BrokenSample(f"has the {name} {quoted(value)}, not a number from 0 to {most:g}")

"""Manifest of cached shards: common settings, origin, and the empty prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2s
from typing import Any, ClassVar

from safetensors.torch import load
from torch import Tensor

from lit_prefopt.conditioning import Prompt, Ragged, Text
from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.latents.latent_reader import LatentSample
from lit_prefopt.data.shards.format import GENERATION_FILE, Shard
from lit_prefopt.errors import InputError
from lit_prefopt.utils.filesystem import read_whole

NOTES = "notes"  # its informative part, which need not match
EMPTY = "empty.safetensors"  # the empty prompt of the whole set


@dataclass
class LatentSet:
    """Common settings of all samples of cached shards.

    Args:
        settings: Settings that determine the content, by name.
        notes: Further information about the origin.
        empty: The empty prompt, one row.
        identity: A string equal for two sets only if settings and pairs are equal.
    """

    settings: dict[str, Any]
    notes: dict[str, Any]
    empty: Prompt
    identity: str

    SHARED: ClassVar[tuple[str, ...]] = (
        *("encoders", "latent_channels", "scaling_factor", "shift_factor", "pixels_per_latent"),
        *("text", "tokens", "dtype", "resolution", "crop", "flip", "views", "deviation"),
    )
    """Settings that every manifest has, and that must match in all folders of one run."""

    OWN: ClassVar[tuple[str, ...]] = (
        *("prompts", "latents", "group_size", "seed", "batch_size", NOTES),
    )
    """Settings of a single folder; any other one, such as a family's own, must match as well."""

    @classmethod
    def from_shards(cls, shards: Sequence[Shard]) -> LatentSet:
        """Read the settings of these shards' folders.

        Raises:
            InputError: Settings are missing or differ.
        """
        folders = list(dict.fromkeys(shard.folder for shard in shards))
        found = [_read_metadata(folder) for folder in folders]
        first, *others = found
        for folder, other in zip(folders[1:], others, strict=True):
            names = dict.fromkeys((*cls.SHARED, *first, *other))
            shared = [name for name in names if name not in cls.OWN]
            differing = [name for name in shared if other.get(name) != first.get(name)]
            if differing:
                raise InputError(
                    f"{folders[0]} and {folder} were cached differently ({', '.join(differing)}): "
                    "train on one of them, or cache both with the same recipe."
                )
        decisive = [{n: v for n, v in one.items() if n != NOTES} for one in found]
        # not the sizes of the shards: latents of other pairs have the same size
        text = json.dumps(decisive, sort_keys=True)
        identity = blake2s(text.encode(), digest_size=8).hexdigest()
        return cls(decisive[0], first.get(NOTES, {}), _read_empty(folders[0]), identity)

    @property
    def summary(self) -> str:
        """Description of the latents."""
        settings, form = self.settings, str(self.settings.get("dtype"))
        views = f"{settings['views']} {'random' if settings['crop'] == 'random' else 'middle'} crop"
        mirrored = ", also mirrored" if settings["flip"] else ""
        kept = "" if settings["deviation"] else ", means only"
        return (
            f"latents of {self.notes.get('checkpoint')} at {settings['resolution']} pixels in "
            f"{form}: {views}{'s' if settings['views'] > 1 else ''} of each pair{mirrored}{kept}"
        )

    def check(self, sample: LatentSample) -> None:
        """Check that a sample belongs to this set; raise BrokenSample (without its name) if not."""
        settings, mean = self.settings, sample.tensors["mean"]
        side = settings["resolution"] // settings["pixels_per_latent"]
        shape = (
            settings["views"] * (1 + settings["flip"]),
            settings["latent_channels"],
            side,
            side,
        )
        form = (mean.shape[0], *mean.shape[2:]), str(mean.dtype).removeprefix("torch.")
        if form != (shape, settings["dtype"]):
            raise BrokenSample("differs from the latents of its set: cache it again")
        if settings["deviation"] != ("deviation" in sample.tensors):
            raise BrokenSample("differs from the latents of its set: cache it again")
        own, text = sample.prompt, self.empty.text
        if differing := sorted(own.keys() ^ text.keys()):
            where = "only its set" if differing[0] in text else "not its set"
            raise BrokenSample(
                f"has other parts of a prompt than its set ({where} has {differing[0]}): cache it "
                "again"
            )
        if not all(_same_form(own[name], like) for name, like in text.items()):
            raise BrokenSample("has a prompt of another shape than its set: cache it again")


def _same_form(row: Tensor, like: Text) -> bool:
    """Whether one prompt's row has the precision and shape of a set, whose ragged lengths vary."""
    if row.dtype != like.dtype:
        return False
    if isinstance(like, Ragged):
        return row.dim() == len(like.shape) and row.shape[1:] == like.shape[1:]
    return row.shape == like.shape[1:]


def _read_metadata(folder: str) -> dict[str, Any]:
    text = _fetched(folder, GENERATION_FILE)
    try:
        metadata: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InputError(f"{folder}/{GENERATION_FILE} is not JSON: copy it again.") from error
    missing = [name for name in LatentSet.SHARED if name not in metadata]
    if missing:
        raise InputError(
            f"{folder}/{GENERATION_FILE} has no {missing[0]} of its latents: "
            "cache them again with `lit-prefopt predict`."
        )
    return metadata


def _read_empty(folder: str) -> Prompt:
    return Prompt.from_tensors(load(_fetched(folder, EMPTY)))


def _fetched(folder: str, name: str) -> bytes:
    try:
        return read_whole(f"{folder}/{name}")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} contains cached latents but no {name}: copy the whole output folder of "
            "`lit-prefopt predict`."
        ) from error

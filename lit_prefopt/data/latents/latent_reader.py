"""Read cached samples: latents and prompt embeddings of a pair, as a member of its shard.

A sample has 000001.txt and 000001.json like a pair of images, and instead of the images
000001.cache.safetensors with

    mean, deviation  (V, K, C, H, W): the VAE's posterior of V views of K sides, in its precision
    frames           (V, K, 6) int64: see `conditioning.Prompt`
    masks            (V, 1, H, W) float32, where the pair has a mask

and the text tensors of the embedded prompt, all other names, in the text encoders' precision: with
Stable Diffusion `hidden` (N, D), with SDXL also `pooled` (P,). A ragged one has its own length and
no padding. `deviation` and `masks` are optional. Mirrored views follow the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_prefopt.conditioning import RESERVED
from lit_prefopt.data.images import BrokenSample, Size
from lit_prefopt.data.shards.format import CACHED, LATENTS
from lit_prefopt.data.shards.reader import ShardReader, parse
from lit_prefopt.data.shards.sides import picked_meta

NEEDED = ("mean", "frames")
BY_SIDE = ("mean", "deviation", "frames")  # tensors (V, K, ...)


class LatentSample(NamedTuple):
    """One cached sample as stored."""

    name: str  # "shard.tar/000001"
    text: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def views(self) -> dict[str, Tensor]:
        """Tensors with an entry for each view, by name."""
        return {name: x for name, x in self.tensors.items() if name in RESERVED}

    @property
    def prompt(self) -> dict[str, Tensor]:
        """Text tensors of the embedded prompt by name, one row."""
        return {name: x for name, x in self.tensors.items() if name not in RESERVED}

    @property
    def side_count(self) -> int:
        """Number of sides, K."""
        return self.tensors["mean"].shape[1]

    def best_and_worst(self) -> LatentSample:
        """Return a sample of its best and its worst side; unchanged if it has no more."""
        count = self.side_count
        if count <= 2:
            return self
        which = [0, count - 1]
        picked = {name: x[:, which] for name, x in self.tensors.items() if name in BY_SIDE}
        meta = picked_meta(self.meta, count, which)
        return self._replace(tensors={**self.tensors, **picked}, meta=meta)

    @property
    def sizes(self) -> list[Size]:
        """Original width and height of each side, best side first."""
        return [(int(w), int(h)) for h, w in self.tensors["frames"][0, :, :2].tolist()]


class LatentReader(ShardReader):
    """Reads single samples of local or remote shards of cached latents."""

    KIND: ClassVar[str] = LATENTS
    CURE: ClassVar[str] = (
        "cache them with `lit-prefopt predict --config sd15-cache --data.shards FOLDER`, or train "
        "on them with `--data PairShards`"
    )

    def parse(self, name: str, members: Mapping[str, Any]) -> LatentSample:
        """Parse a cached sample from its members."""
        return parse_latents(name, members)


def parse_latents(name: str, members: Mapping[str, Any]) -> LatentSample:
    """Parse a cached sample from its members; raise BrokenSample if it cannot be used.

    Args:
        name: Name of the sample, for messages.
        members: Bytes by extension, as `unpack` returns them; unknown ones are ignored.
    """
    described = parse(name, members, sides=())
    if CACHED not in members:
        raise BrokenSample(f"has no latents (.{CACHED})")
    try:
        tensors = load(bytes(members[CACHED]))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BrokenSample(f"has latents that cannot be read ({error})") from error
    missing = [key for key in NEEDED if key not in tensors]
    if missing:
        raise BrokenSample(f"has latents without {missing[0]}")
    if not tensors.keys() - {*RESERVED}:
        raise BrokenSample("has latents without an embedded prompt")
    mean, frames = tensors["mean"], tensors["frames"]
    masks = tensors.get("masks")
    fits = (
        mean.dim() == 5
        and frames.shape == (*mean.shape[:2], 6)
        and tensors.get("deviation", mean).shape == mean.shape
        and (masks is None or masks.shape == (mean.shape[0], 1, *mean.shape[3:]))
    )
    if not fits:
        raise BrokenSample("has latents of inconsistent shapes")
    return LatentSample(name, described.text, tensors, described.meta)


def members_of(text: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict:
    """Return the members of a cached sample, bytes by extension."""
    members = {"txt": text.encode()}
    if meta:
        members["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
    return {**members, CACHED: save({k: v.contiguous() for k, v in tensors.items()})}

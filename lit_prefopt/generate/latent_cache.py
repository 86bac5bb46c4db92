"""Cache pairs: encode images and prompts of stored pairs once, for repeated training."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from safetensors.torch import save_file
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import scaled
from lit_prefopt.cache_checks import check_text
from lit_prefopt.data.images import Augment, BrokenSample, Size, decode
from lit_prefopt.data.latents.manifest import EMPTY, LatentSet
from lit_prefopt.data.shards.format import LATENTS, SIDES
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import Sample
from lit_prefopt.data.shards.sides import side_counts
from lit_prefopt.datamodules.generation import (
    CachedGroups,
    GenerationDataModule,
    ShardGroups,
    StoredGroup,
)
from lit_prefopt.diffusion.encoding import resize_masks
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.generate.cached_latents import EncodedPair, check_same_vae, fitting, with_prompts
from lit_prefopt.generate.output_formats import OutputFormat, ShardFormat
from lit_prefopt.generate.producer import Producer
from lit_prefopt.utils.fingerprint import fingerprint
from lit_prefopt.utils.parallel import map_in_order
from lit_prefopt.utils.seeds import stable_seed

log = logging.getLogger(__name__)

VERSIONS = ("torch", "diffusers", "transformers")


class PairViews(NamedTuple):
    """One pair, decoded and cropped."""

    sample: Sample
    shard: int
    size: Size  # of the best side
    images: Tensor  # (V, K, 3, H, W); empty once they are encoded
    frames: Tensor  # (V, K, 6)
    masks: Tensor | None  # (V, 1, H, W)


Latents = tuple[list[PairViews], Tensor, Tensor]
"""Pairs without images, with mean and deviation of their latents, (B, V, K, C, h, w)."""


class LatentCache(Producer):
    """Encodes the images and prompts of pair shards, for training with `CachedPairs`.

    The cache contains mean and deviation of the VAE's posterior in its own precision, so that
    training samples the same latents as from images, and the prompt embeddings. Every shard of
    images becomes one of latents, so that the order of samples does not change.

    A prompt is stored as the text tensors that the family embeds, each by its name and in its
    precision, and without padding where prompts have lengths of their own.

    A cache of another model with the same VAE serves as the source as well: with
    `--data CachedGroups --data.shards CACHE` its latents are stored again with this model's
    prompts, and neither images nor VAE are needed. The shards are the same, bit for bit, as those
    encoded from the images.

    In bfloat16 a view of a pair takes 0.13 MB at 512 pixels and 0.52 MB at 1024; a prompt takes
    0.12 MB with Stable Diffusion 1.x and 0.32 MB with SDXL.

    Args:
        backbone: The model whose VAE and text encoders are used; given as the recipe's own key
            `backbone`.
        output: Output folder of cached shards.
        resolution: Width and height of the encoded images, in pixels.
        crop: Crop of non-square images: the middle, or random crops, the same for both sides.
        flip: Also store every view mirrored, which doubles the size; not for prompts that
            mention left and right.
        views: Number of random crops per pair; the middle crop is a single one.
        deviation: Store the posterior's deviation; without it the latents take half the space and
            training uses the mean.
        batch_size: Images encoded at a time.
        workers: Threads that decode images; by default one per core.
        offload: Keep only the network that is encoding on the device: for each group of pairs the
            VAE, then each text encoder; the others wait in the host's memory. The output is the
            same.
    """

    WANTS: ClassVar[type[GenerationDataModule]] = ShardGroups
    WANTED: ClassVar[str] = "SampleGroups` or `--data CachedGroups"

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        resolution: int,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        views: int = 1,
        deviation: bool = True,
        batch_size: int = 16,
        workers: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(backbone, output)
        check_number("resolution", resolution, 1)
        check_number("views", views, 1)
        check_number("batch_size", batch_size, 1)
        check_number("workers", workers, 1, optional=True)
        if not backbone.has_size(resolution, resolution):
            raise InputError(
                f"Images of {resolution} pixels cannot be encoded: set `resolution` to "
                f"{backbone.sizes}."
            )
        if crop == "center" and views > 1:
            raise InputError(
                f"There are no {views} middle crops of an image: set `views` to 1, or `crop` to "
                "random."
            )
        backbone.freeze()
        self.augment = Augment((resolution, resolution), crop)
        self.flip, self.views, self.deviation = flip, views, deviation
        self.batch_size, self.workers, self.offload = batch_size, workers, offload
        self.latents: LatentSet | None = None  # of the cache that is read in place of images
        self.sides = len(SIDES)  # of a sample at most
        self._last: UserCpuOffloadHook | None = None

    @property
    def form(self) -> OutputFormat:
        """Format of the output folder."""
        return ShardFormat(LATENTS, numbered=True)

    def model_settings(self) -> dict[str, Any]:
        """Return the encoders' settings; the denoiser is not used and may be any."""
        encoders = {name: fingerprint(part) for name, part in self.backbone.encoders.items()}
        dtype = str(self.backbone.latent_dtype).removeprefix("torch.")
        return {"encoders": encoders, **self.backbone.latent_settings(), "dtype": dtype}

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, besides model and pairs."""
        return {
            "resolution": self.augment.size[0],
            "crop": self.augment.crop,
            "flip": self.flip,
            "views": self.views,
            "deviation": self.deviation,
            "batch_size": self.batch_size,
        }

    def notes(self) -> dict[str, Any]:
        """Return notes on the origin of the output."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        return {"checkpoint": self.backbone.checkpoint, **versions}

    def setup(self, stage: str | None = None) -> None:
        """Check an existing output before encoding."""
        self.backbone.require_encoders("LatentCache")
        data = self.groups()
        if isinstance(data, CachedGroups):
            check_same_vae(self.backbone, data.latents, self.settings())
            self.latents = data.latents
        assert isinstance(data, ShardGroups)
        self.sides = max(side_counts(data.reader.shards), default=self.sides)
        super().setup(stage)

    def on_predict_start(self) -> None:
        """Check the embedded prompts before the first pair is encoded."""
        check_text(self.backbone)
        if self.offload:
            for network in self.backbone.encoders.values():  # the VAE first, as it is used first
                _, self._last = cpu_offload_with_hook(network, self.device, self._last)
        super().on_predict_start()

    def make(self, group: StoredGroup) -> list[EncodedPair]:
        """Encode the pairs of a group, a batch of images at a time."""
        made = self._encoded(group) if self.latents is None else self._reused(self.latents, group)
        if self._last is not None:
            self._last.offload()
        return made

    def _encoded(self, group: StoredGroup) -> list[EncodedPair]:
        """Encode the images and the prompts of a group."""
        encoded: Iterable[Latents] = map(self._latents, self._batches(group))
        if self.offload:
            encoded = [*encoded]  # all images before the first prompt
        return [pair for part in encoded for pair in self._with_prompts(*part)]

    def _reused(self, latents: LatentSet, group: StoredGroup) -> list[EncodedPair]:
        """Embed the prompts of a group of cached pairs."""
        pairs, unfit = fitting(latents, group)
        self.left_out["broken pairs"] += unfit
        return with_prompts(self.backbone, pairs, self._pairs_at_a_time)

    def _batches(self, group: StoredGroup) -> Iterator[list[PairViews]]:
        """Yield the pairs of a group whose images are encoded together."""
        pairs = zip(group.samples, group.shards, group.seeds.tolist(), strict=True)
        waiting: list[PairViews] = []
        for views in map_in_order(self._decoded, pairs, self.workers):
            if isinstance(views, str):
                log.warning("A pair cannot be read and is skipped: %s.", views)
                self.left_out["broken pairs"] += 1
                continue
            # lists of another length are encoded in batches of their own
            other = bool(waiting) and views.images.shape != waiting[0].images.shape
            if other or len(waiting) == self._pairs_at_a_time:
                yield waiting
                waiting = []
            waiting.append(views)
        if waiting:
            yield waiting

    def complete(self, folder: Path) -> None:
        """Write the empty prompt, once for all pairs."""
        prompt = self.backbone.empty
        tensors = {name: x.contiguous() for name, x in prompt.cpu().tensors().items()}
        save_file(tensors, folder / EMPTY)
        (folder / EMPTY).chmod(0o644)

    def summary(self) -> str:
        """Return the size of a pair on disk."""
        sizes = [path.stat().st_size for path in self.output.glob("*.tar")]
        pairs = sum(len(shard.offsets) for shard in read_index(str(self.output)))
        return f", {sum(sizes) / pairs / 1e6:.3f} MB each"

    @property
    def _pairs_at_a_time(self) -> int:
        """Number of pairs that are encoded together."""
        return -(-self.batch_size // (self.views * (1 + self.flip) * self.sides))

    def _decoded(self, pair: tuple[Sample, int, int]) -> PairViews | str:
        """Decode all views of a pair; return the error message if it is broken."""
        sample, shard, seed = pair
        try:
            return self._views(sample, shard, seed)
        except BrokenSample as error:
            return f"{sample.name}: {error}"

    def _views(self, sample: Sample, shard: int, seed: int) -> PairViews:
        sides = [decode(data) for data in sample.sides]
        mask = None if sample.mask is None else decode(sample.mask, "L")
        images, frames, masks = [], [], []
        for mirrored in (False, True) if self.flip else (False,):
            for view in range(self.views):
                crop, _ = self.augment.draw(sides[0].size, stable_seed("view", seed, view))
                crop = crop._replace(flip=mirrored)
                images.append(scaled(self.augment.images(sides, crop)))
                frames.append([self.augment.frame(side.size, crop) for side in sides])
                if mask is not None:
                    masks.append(self.augment.mask(mask, sides[0].size, crop))
        return PairViews(
            sample,
            shard,
            sides[0].size,
            torch.stack(images),
            torch.tensor(frames),
            torch.stack(masks) if masks else None,
        )

    @torch.no_grad()
    def _latents(self, pairs: list[PairViews]) -> Latents:
        """Encode the images of pairs to mean and deviation, (B, V, K, C, h, w)."""
        images = torch.cat([pair.images.flatten(0, 1) for pair in pairs])
        batches = [
            self.backbone.posterior(part.to(self.device)) for part in images.split(self.batch_size)
        ]
        form = len(pairs), *pairs[0].images.shape[:2]
        mean, deviation = (
            torch.cat(x).unflatten(0, form).cpu() for x in zip(*batches, strict=True)
        )
        encoded = [pair._replace(images=pair.images.new_empty(0)) for pair in pairs]
        return encoded, mean, deviation

    @torch.no_grad()
    def _with_prompts(
        self, pairs: list[PairViews], mean: Tensor, deviation: Tensor
    ) -> list[EncodedPair]:
        """Embed the prompts of encoded pairs, and return what the cache stores."""
        prompt = self.backbone.embed([pair.sample.text for pair in pairs]).cpu()
        made = []
        for i, pair in enumerate(pairs):
            if not (mean[i].isfinite().all() and deviation[i].isfinite().all()):
                self.left_out["pairs on which the VAE overflows"] += 1
                continue
            tensors = {"mean": mean[i], "frames": pair.frames}
            if self.deviation:
                tensors["deviation"] = deviation[i]
            if pair.masks is not None:
                tensors["masks"] = resize_masks(pair.masks, mean)
            tensors |= prompt.row(i)
            stored = pair.sample.text, tensors, pair.sample.meta
            made.append(EncodedPair(*stored, pair.shard, pair.size))
        return made

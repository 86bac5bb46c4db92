"""Data module of cached pairs: latents and embedded prompts instead of images and texts."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lit_prefopt.data.images import Size
from lit_prefopt.data.latents.error_table import ErrorTable
from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.latents.latent_samples import FixedDrawLoader, LatentSampleLoader
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.errors import InputError


class CachedPairs(StoredPairs):
    """Pairs whose images and prompts were encoded before, by `predict --config sd15-cache`.

    `shards` and `validation` name cached shards. Order, seeds and random numbers are those of
    `PairShards` on the images: with a center crop both train alike, up to rounding in VAE and text
    encoders at another batch size. With `--backbone.encoders false` neither of these is loaded.

    With `reference` the reference is not computed either: its errors are read from a table that
    `predict --config sd15-reference-cache` wrote at a few fixed draws of each pair (timestep,
    noise, view, dropped caption, VAE sample). Epoch n uses draw n modulo their number.

    Args:
        reference: Local folder of the reference's errors on `shards`; computed by the backbone's
            own reference if not given.
        validation_reference: Local folder of the reference's errors on `validation`, written with
            `held_out`; computed by the backbone's own reference if not given.
    """

    READER: ClassVar[type[ShardReader]] = LatentReader

    reader: LatentReader
    validation_reader: LatentReader

    def __init__(
        self,
        *args: Any,
        reference: str | None = None,
        validation_reference: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        tables = [ErrorTable(one) if one else None for one in (reference, validation_reference)]
        self.reference, self.validation_reference = tables
        self.latents: LatentSet | None = None  # known after setup
        self.validation_latents: LatentSet | None = None

    @property
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""
        return self.latents is not None and bool(self.latents.settings["flip"])

    @property
    def sets(self) -> list[LatentSet]:
        """Manifests of the training and of the held-out pairs, as far as they were set up."""
        return [one for one in (self.latents, self.validation_latents) if one is not None]

    @property
    def image_sizes(self) -> list[Size]:
        """Widths and heights of the images that were cached."""
        sides = [one.settings["resolution"] for one in self.sets]
        return [(side, side) for side in sides]

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and manifests, and check that all fit each other."""
        super().setup(stage)
        if stage in ("fit", None):
            _check_table(self.reference, self.reader, self.latents, held_out=False)
            self._check_dropout()
        if self.validation is not None:
            self.validation_latents = held_out = LatentSet.from_shards(
                self.validation_reader.shards
            )
            if held_out.settings["crop"] != "center":
                rank_zero_warn(
                    f"{self.validation} was cached with random crops: each held-out pair is shown "
                    "by its first one, always the same; `--model.crop center` caches the middle."
                )
            _check_table(self.validation_reference, self.validation_reader, held_out, held_out=True)

    def _check_dropout(self) -> None:
        if self.reference is None:
            return
        made = self.reference.settings["caption_dropout"]
        if made != self.caption_dropout:
            raise InputError(
                f"The reference's errors in {self.reference.folder} were computed with a caption "
                f"dropout of {made}, not {self.caption_dropout}: set `--data.caption_dropout "
                f"{made}`, or compute them again."
            )

    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        self.latents = LatentSet.from_shards(self.reader.shards)
        side = self.latents.settings["resolution"]
        plan = Plan(self.reader.counts, self.seed, self.shards_per_block)
        return plan, [(side, side)]

    def _sample_loader(self) -> LatentSampleLoader:
        return _loader_of(
            self.reader, self.seed, self.latents, self.reference, self.caption_dropout
        )

    def _held_out_sample_loader(self) -> LatentSampleLoader:
        reader, latents = self.validation_reader, self.validation_latents
        return _loader_of(reader, self.seed, latents, self.validation_reference, held_out=True)


def _loader_of(
    reader: LatentReader,
    seed: int,
    latents: LatentSet | None,
    table: ErrorTable | None,
    caption_dropout: float = 0.0,
    *,
    held_out: bool = False,
) -> LatentSampleLoader:
    """Return the loader of latents, with the reference's errors of a table if there is one."""
    if table is None:
        return LatentSampleLoader(reader, seed, _known(latents), caption_dropout, held_out)
    options = {"caption_dropout": caption_dropout, "held_out": held_out}
    return FixedDrawLoader(reader, table, _known(latents), **options)


def _known(latents: LatentSet | None) -> LatentSet:
    if latents is None:
        raise InputError("The cached shards have not been read yet: call `setup` first.")
    return latents


def _check_table(
    table: ErrorTable | None, reader: ShardReader, latents: LatentSet | None, *, held_out: bool
) -> None:
    """Check that the reference's errors are those of these pairs, held out or not."""
    if table is None:
        return
    if table.settings.get("held_out") != held_out:
        were, are = ("not ", "") if held_out else ("", "not ")
        raise InputError(
            f"The reference's errors in {table.folder} were {were}computed for held-out pairs, and "
            f"these are {are}held out: compute them by `--model.held_out {str(held_out).lower()}`."
        )
    pairs = sum(reader.counts)
    expected = {"latents": _known(latents).identity, "prompts": reader.fingerprint(pairs)}
    if (
        any(table.settings.get(name) != value for name, value in expected.items())
        or table.pairs != pairs
    ):
        raise InputError(
            f"The reference's errors in {table.folder} were computed on other pairs, or on pairs "
            "that were cached otherwise: name the same shards in the same order, or compute them "
            "again."
        )

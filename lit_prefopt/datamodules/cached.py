"""The data module of cached pairs: latents and embedded prompts in images' and texts' place."""

from __future__ import annotations

from typing import ClassVar

from lit_prefopt.data.images import Size
from lit_prefopt.data.latents.error_table import ErrorTable
from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.latents.latent_samples import FixedDrawLoader, LatentSampleLoader
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.order.plan import Plan, SampleOrder
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.errors import InputError


class CachedPairs(StoredPairs):
    """Pairs whose images and prompts were encoded beforehand, by `predict --config sd15-cache`.

    Order, seeds and draws are those of `PairShards` on the images: with a middle crop both train
    alike, but for what batches of another size do to the last digits of VAE and text encoders.
    With `--backbone.encoders false` neither of them is loaded.

    With `reference` the reference is not asked either: its errors are read from a table that
    `predict --config sd15-reference-cache` made at a few fixed draws of each pair (timestep, noise,
    view, dropped caption, what the VAE adds). The n-th epoch uses the draw n modulo their number.

    Args:
        shards: Folder or URL (https, s3, hf) of the cached shards to train on, or a list of them;
            {000..009} and {a,b} stand for each of their alternatives.
        batch_size: Pairs in a batch of one rank.
        validation: The held-out shards, cached as well; none: no validation.
        caption_dropout: Share of the training pairs whose prompt is left empty.
        workers: Processes that read, for each rank; 0 does it in the main process.
        seed: Seed of the order and whatever else is drawn for a sample.
        shards_per_block: How many shards are shuffled among each other at a time.
        broken_share: Largest share of unreadable pairs that others may stand in for; 0 stops at
            the first one.
        validation_pairs: How many pairs validation uses at most; none: all.
        reference: Local folder of the reference's errors on `shards`; the backbone's own reference
            is asked where it is not given.
        validation_reference: Local folder of the reference's errors on `validation`, made with
            `held_out`; the backbone's own reference is asked where it is not given.
        cache: Folder that remote shards are kept in, shared by all processes of a machine; none:
            `lit-prefopt` in $XDG_CACHE_HOME or ~/.cache.
        cache_size: Most bytes that they take; those opened longest ago make room.
    """

    READER: ClassVar[type[ShardReader]] = LatentReader

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int,
        validation: str | list[str] | None = None,
        caption_dropout: float = 0.0,
        workers: int = 2,
        seed: int = 0,
        shards_per_block: int = 8,
        broken_share: float = 0.01,
        validation_pairs: int | None = None,
        reference: str | None = None,
        validation_reference: str | None = None,
        cache: str | None = None,
        cache_size: int = 64_000_000_000,
    ) -> None:
        super().__init__(
            shards,
            validation,
            batch_size,
            caption_dropout,
            workers,
            seed,
            shards_per_block,
            broken_share,
            validation_pairs,
            ShardCache(cache, cache_size),
        )
        tables = [ErrorTable(one) if one else None for one in (reference, validation_reference)]
        self.reference, self.validation_reference = tables
        self.latents: LatentSet | None = None  # known after setup
        self.validation_latents: LatentSet | None = None

    @property
    def mirrors(self) -> bool:
        """Whether training sees mirrored pictures."""
        return self.latents is not None and bool(self.latents.settings["flip"])

    @property
    def sets(self) -> list[LatentSet]:
        """What holds of the training and of the held-out pairs, as far as they were set up."""
        return [one for one in (self.latents, self.validation_latents) if one is not None]

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and what is told of the latents, and see that all fit each other."""
        super().setup(stage)
        if stage in ("fit", None):
            _check_table(self.reference, self.reader, self.latents, held_out=False)
            self._check_dropout()
        if self.validation is not None:
            self.validation_latents = held_out = LatentSet.from_shards(
                self.validation_reader.shards
            )
            if held_out.settings["crop"] != "center":
                raise InputError(
                    f"{self.validation} was cached with random crops, which would make validation "
                    "depend on them: cache held-out pairs by `--model.crop center`."
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
    reader: ShardReader,
    seed: int,
    latents: LatentSet | None,
    table: ErrorTable | None,
    caption_dropout: float = 0.0,
    *,
    held_out: bool = False,
) -> LatentSampleLoader:
    assert isinstance(reader, LatentReader)
    assert latents is not None
    if table is None:
        return LatentSampleLoader(reader, seed, latents, caption_dropout, held_out)
    return FixedDrawLoader(reader, table, latents, caption_dropout, held_out)


def _check_table(
    table: ErrorTable | None, reader: ShardReader, latents: LatentSet | None, *, held_out: bool
) -> None:
    """Refuse the reference's errors on other pairs, or at draws of the other sort."""
    if table is None:
        return
    assert latents is not None
    if table.settings.get("held_out") != held_out:
        were, are = ("not ", "") if held_out else ("", "not ")
        raise InputError(
            f"The reference's errors in {table.folder} were {were}computed for held-out pairs, and "
            f"these are {are}held out: compute them by `--model.held_out {str(held_out).lower()}`."
        )
    pairs = sum(reader.counts)
    expected = {"latents": latents.identity, "prompts": reader.fingerprint(pairs)}
    if (
        any(table.settings.get(name) != value for name, value in expected.items())
        or table.pairs != pairs
    ):
        raise InputError(
            f"The reference's errors in {table.folder} were computed on other pairs, or on pairs "
            "that were cached in another way: name the same shards in the same order, or compute "
            "them again."
        )

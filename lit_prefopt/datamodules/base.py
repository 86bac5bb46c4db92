"""Base class of data modules of stored pairs: order, loaders, and resuming."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from lightning import LightningDataModule

from lit_prefopt.data.images import Size
from lit_prefopt.data.loading.image_samples import SampleLoader
from lit_prefopt.data.loading.loader import PairLoader, ResumableLoader
from lit_prefopt.data.loading.long_prompts import LongPromptCounter
from lit_prefopt.data.loading.worker import PairBatches
from lit_prefopt.data.order.plan import Plan, RankSplit, SampleOrder
from lit_prefopt.data.order.position import EpochProgress
from lit_prefopt.data.order.shaping import EnlargedCounter, log_dropped, warn_if_enlarged
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.format import Shard
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.utils.quiet import ignore_warnings


class StoredPairs(LightningDataModule):
    """Pairs from shards in a shuffled, resumable order; a subclass loads the samples.

    Args:
        shards: Folder or URL (https, s3, hf) of the shards to train on, with their index.json, or a
            list of them; {000..009} and {a,b} are expanded.
        batch_size: Pairs in a batch of one rank.
        validation: Folder or URL of the held-out shards, or a list of them; no validation if not
            given.
        caption_dropout: Share of the training pairs whose prompt is replaced by the empty one.
        workers: Processes of each rank that read and decode; 0 reads in the main process.
        seed: Seed of the order and of all random numbers of samples (crops, flips, noise).
        shards_per_block: Number of shards that are shuffled together.
        broken_share: Largest share of unreadable pairs, which are replaced by others; 0 stops at
            the first one.
        validation_pairs: Largest number of pairs in validation; all if not given.
        cache: Folder of downloaded shards, shared by all processes of a machine; `lit-prefopt` in
            $XDG_CACHE_HOME or ~/.cache if not given.
        cache_size: Largest size of that folder in bytes; least recently opened shards are deleted.
    """

    resumable: type[ResumableLoader] = ResumableLoader
    """Loader of the training pairs."""

    READER: ClassVar[type[ShardReader]] = ShardReader
    """Reader of a sample."""

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int,
        *,
        validation: str | list[str] | None = None,
        caption_dropout: float = 0.0,
        workers: int = 2,
        seed: int = 0,
        shards_per_block: int = 8,
        broken_share: float = 0.01,
        validation_pairs: int | None = None,
        cache: str | None = None,
        cache_size: int = 64_000_000_000,
    ) -> None:
        super().__init__()
        check_number("workers", workers, 0)
        check_number("broken_share", broken_share, 0, 1)
        check_number("validation_pairs", validation_pairs, 1, optional=True)
        check_at_least_one(batch_size=batch_size, shards_per_block=shards_per_block)
        if not 0 <= caption_dropout <= 1:
            raise InputError(f"caption_dropout is {caption_dropout}; give a share from 0 to 1.")
        self.shards, self.validation = shards, validation
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.caption_dropout = caption_dropout
        self.shards_per_block, self.broken_share = shards_per_block, broken_share
        self.validation_pairs, self.cache = validation_pairs, ShardCache(cache, cache_size)
        self.shapes: list[Size] = []  # width and height of each bucket, known after setup
        self.readers: list[tuple[ShardReader, str | list[str]]] = []  # with their shards' names
        self.loaders: dict[str, PairLoader] = {}
        self.fits_context: Callable[[str], bool] | None = None  # of the backbone that is trained
        self._long_prompts: dict[str, LongPromptCounter] = {}
        self._epoch_progress: EpochProgress | None = None

    @property
    @abstractmethod
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""

    @property
    @abstractmethod
    def image_sizes(self) -> list[Size]:
        """Widths and heights of the images of all batches, as far as they were set up."""

    @property
    def broken(self) -> list[str]:
        """Names of the samples that could not be read so far, with the reasons."""
        return [name for loader in self.loaders.values() for name in loader.broken.names]

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes, so that wrong paths and changed shards fail at the start."""
        ignore_warnings()
        self._epoch_progress = None
        self.readers = []
        if stage in ("fit", None):
            self.reader = self._reader(self._find())
            self.readers.append((self.reader, self.shards))
            self.order, self.shapes = self._make_order()
        if self.validation is not None:
            self.validation_reader = self._reader(find_shards(self.validation))
            self.readers.append((self.validation_reader, self.validation))

    @property
    def batches_per_epoch(self) -> int:
        """Number of training batches of an epoch on one rank."""
        return self.order.samples // self._ranks(self.batch_size).global_batch

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of the training pairs, resumable at any batch."""
        order, ranks = self.order, self._ranks(self.batch_size)
        _check_size(self.shards, order.samples, ranks)
        batches = PairBatches(order, self._sample_loader(), ranks, order.samples, self.broken_share)
        trainer = self.trainer
        progress = (lambda: trainer.fit_loop.epoch_loop.batch_progress) if trainer else None
        known = True
        if self._epoch_progress is None:  # kept when the loader is rebuilt within a run
            self._epoch_progress = EpochProgress(order.samples, ranks.global_batch, self._limit())
            log_dropped(order, ranks)
            known = warn_if_enlarged(self.reader.shards, order, self.shapes)
        pinned = self._pinned()
        loader = self.resumable(
            batches, self._epoch_progress, progress, self.workers, pinned=pinned
        )
        loader.enlarged = None if known else EnlargedCounter()
        loader.long_prompts = self._long_prompt_counter("training")
        self.loaders["train"] = loader
        return loader

    def val_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs: in stored order, nothing random."""
        if self.validation is None:
            return []
        plan = Plan(self.validation_reader.counts, self.seed, shuffle=False)
        samples = min(plan.samples, self.validation_pairs or plan.samples)
        world = self._ranks(1).world
        # a small set has smaller batches, so that every rank has one
        ranks = self._ranks(max(1, min(self.batch_size, samples // world)))
        _check_size(self.validation, samples, ranks)
        # several ranks need equally many batches; a single one may have a smaller last batch
        length = samples // ranks.global_batch if world > 1 else -(-samples // ranks.batch_size)
        batches = PairBatches(
            plan, self._held_out_sample_loader(), ranks, samples, self.broken_share
        )
        loader = PairLoader(batches, length, self.workers, pinned=self._pinned())
        loader.long_prompts = self._long_prompt_counter("held-out")
        self.loaders["validation"] = loader
        return loader

    def test_dataloader(self) -> PairLoader | list[PairLoader]:
        """Return the loader of the held-out pairs, as for validation."""
        return self.val_dataloader()

    def _find(self) -> list[Shard]:
        """Return the shards to train on."""
        return find_shards(self.shards)

    @abstractmethod
    def _make_order(self) -> tuple[SampleOrder, list[Size]]:
        """Return the order of the training pairs, and the width and height of each bucket."""

    @abstractmethod
    def _sample_loader(self) -> SampleLoader:
        """Return the loader of the training samples."""

    @abstractmethod
    def _held_out_sample_loader(self) -> SampleLoader:
        """Return the loader of the held-out samples, without random crops and flips."""

    def _long_prompt_counter(self, which: str) -> LongPromptCounter | None:
        """Return a counter of prompts, kept when the loader is rebuilt within a run."""
        if self.fits_context is None:
            return None
        return self._long_prompts.setdefault(which, LongPromptCounter(self.fits_context, which))

    def _reader(self, shards: list[Shard]) -> ShardReader:
        self.cache.check(shards, self.shards_per_block)
        return self.READER(shards, cache=self.cache).check()

    def _ranks(self, batch_size: int) -> RankSplit:
        if self.trainer is None:
            return RankSplit(0, 1, batch_size)
        return RankSplit(self.trainer.global_rank, self.trainer.world_size, batch_size)

    def _pinned(self) -> bool:
        """Whether batches are copied to a GPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _limit(self) -> float:
        return 1.0 if self.trainer is None else self.trainer.limit_train_batches


def check_at_least_one(**numbers: int) -> None:
    """Check that numbers are at least 1, given by their names in the recipe."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; give at least 1.")


def _check_size(shards: Sequence[str] | str, samples: int, ranks: RankSplit) -> None:
    if samples < ranks.global_batch:
        raise InputError(
            f"{shards} has {samples} pairs, less than one batch of {ranks.batch_size} on each of "
            f"{ranks.world} ranks; lower `batch_size` or give more pairs."
        )

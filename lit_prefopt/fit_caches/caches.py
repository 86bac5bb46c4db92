"""Caches of a run that trains on images: whether it can have them, and what a method calls."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_prefopt.batches import ImagePairs, LatentPairs, Pairs
from lit_prefopt.cache_checks import CacheUser
from lit_prefopt.data.shards.format import MOST_SIDES
from lit_prefopt.datamodules.pairs import PairShards
from lit_prefopt.effective_batch import planned_steps
from lit_prefopt.fit_caches.encoding_cache import FOLDER, EncodingCache, StoreBounds
from lit_prefopt.fit_caches.error_cache import ErrorCache
from lit_prefopt.fit_caches.identity import encoding_settings, error_settings, hash_of


class CachingMethod(CacheUser, Protocol):
    """The part of a method on which the caches of its training depend."""

    chosen_only: bool
    training: bool


class FitCaches:
    """Caches that a run fills itself: encodings, and errors of the reference.

    Args:
        encodings: Latents and prompts.
        held_out_errors: Errors of held-out pairs, whose draws are the same at every validation.
        errors: Errors at the fixed draws of training pairs.
        returns: Whether the run visits training pairs more than once.
        draws: Draws of a held-out pair.
    """

    def __init__(
        self,
        encodings: EncodingCache,
        held_out_errors: ErrorCache | None,
        errors: ErrorCache | None,
        *,
        returns: bool,
        draws: int,
    ) -> None:
        self.encodings, self.held_out_errors, self.errors = encodings, held_out_errors, errors
        self.returns, self.draws = returns, draws
        self._current: ErrorCache | None = None

    @classmethod
    def of_run(cls, module: CachingMethod, data: object) -> FitCaches | None:
        """Return the caches of a run, and set up its data module; None if it has none.

        Args:
            module: The method with its backbone, at the weights that training starts from.
            data: The data module, after its setup.
        """
        if not isinstance(data, PairShards) or not data.keep_encodings:
            return None
        trainer, strategy = module.trainer, module.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):  # stage 3 gathers weights for all ranks at once
            return None
        if not data.keeps_latents:
            rank_zero_info(
                "Latents are not kept, because `crop: random` takes another part of an image at "
                "every visit; prompts are. `--data.crop center`, or fixed draws (`--data.draws`), "
                "keep latents too."
            )
        settings = encoding_settings(module.backbone, trainer, data.batch_size)
        root = data.cache.folder / FOLDER
        encodings = EncodingCache(module.backbone, root, settings, store_bounds(trainer, data))
        data.encodings = encodings.store
        data.encoded_sides = 1 if module.chosen_only else MOST_SIDES
        held_out = errors = None
        # with sharded weights, all ranks evaluate the reference together or not at all
        alone = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        if alone and module.takes_reference_errors and module.backbone.has_reference:
            held_out = ErrorCache()
            if data.draws is not None and not module.chosen_only:
                kind = f"errors-{hash_of(error_settings(module))}"
                errors = ErrorCache(encodings.store, kind)
        return cls(
            encodings,
            held_out,
            errors,
            returns=_returns(trainer, data),
            draws=module.validation_draws,
        )

    def encode(self, batch: ImagePairs, *, training: bool) -> LatentPairs:
        """Encode a batch, and store what is new of it.

        Args:
            batch: B pairs of images.
            training: Whether they are training pairs.
        """
        return self.encodings.encode(batch, keep=self.returns or not training)

    def look_up_errors(self, batch: Any, pairs: Pairs, *, training: bool) -> Pairs:
        """Return the pairs with the reference's errors, if they are known of the whole batch.

        Args:
            batch: The batch of the data module.
            pairs: The pairs that were made of it.
            training: Whether they are training pairs.
        """
        self._current = self.errors if training else self.held_out_errors
        records = getattr(batch, "records", None)
        if self._current is None or records is None:
            self._current = None
            return pairs
        return self._current.look_up(pairs, records, batch.texts, 1 if training else self.draws)

    def add_errors(self, seeds: Tensor, errors: Tensor) -> None:
        """Keep errors that the reference computed for the current batch.

        Args:
            seeds: Seeds of the pairs, (B,).
            errors: The errors, (B, K).
        """
        if self._current is not None:
            self._current.add(seeds, errors)

    def flush(self) -> None:
        """Write what was encoded and computed last."""
        self.encodings.flush()
        for errors in (self.held_out_errors, self.errors):
            if errors is not None:
                errors.flush()

    def end_epoch(self, trainer: Any) -> None:
        """Write what is left of an epoch, and read the errors that other ranks computed.

        Args:
            trainer: The Trainer of the run.
        """
        self.flush()
        self.encodings.touch()
        if self.errors is not None and trainer.world_size > 1:
            trainer.strategy.barrier("errors of an epoch")
            self.errors.load()


def store_bounds(trainer: Any, data: PairShards) -> StoreBounds:
    """Return what the encodings of a run may take, and how many they are at most.

    Args:
        trainer: The Trainer of the run.
        data: The data module, after its setup.
    """
    training = sum(data.reader.counts)
    held_out = 0 if data.validation is None else sum(data.validation_reader.counts)
    views = 2 if data.augment.flip else 1
    if data.draws is not None and data.augment.crop == "random":
        views = data.draws
    latents = training * views * data.keeps_latents + held_out
    ranks = max(1, trainer.num_devices)
    prompts = training + held_out + 1
    return StoreBounds(data.cache.limit, latents, prompts, trainer.local_rank, ranks)


def _returns(trainer: Any, data: PairShards) -> bool:
    """Return whether a run visits its training pairs more than once."""
    steps = planned_steps(trainer)
    batches = steps * trainer.accumulate_grad_batches
    return steps < 0 or batches > data.batches_per_epoch

"""The toy world's data: the shipped preference pairs, and captions to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_prefopt.datamodules import (
    CurriculumPairs,
    PairGroups,
    PairShards,
    PromptCollections,
    SampleGroups,
)
from lit_prefopt.prompts.base import PromptEntry, Prompts
from lit_prefopt.toy.scenes import Split, parse, prompts, unused

PAIRS = Path(__file__).parent / "pairs"


class ToyPrompts(Prompts):
    """Captions of the toy world in a fixed order.

    Args:
        count: Number of captions.
        of: `train`, `held-out` for captions that are not used in training, or `validation` for
            held-out ones after the first 256, to tune settings on.
    """

    def __init__(self, count: int = 256, of: Split | Literal["validation"] = "held-out") -> None:
        self.count, self.of = count, of

    def texts(self) -> list[str]:
        """Return the captions."""
        return unused(self.count) if self.of == "validation" else prompts(self.count, self.of)

    def entries(self) -> list[PromptEntry]:
        """Return the captions, with the number of their objects as category."""
        kinds = ("one object", "two objects")
        return [PromptEntry(text, kinds[parse(text).relation is not None]) for text in self.texts()]


class ToyPairs(PairShards):
    """The shipped pairs: 1,024 for training, 256 on held-out captions for validation.

    Args:
        shards: Other pairs to train on, as `PairShards` takes them.
        batch_size: Pairs in a batch of one rank.
        caption_dropout: Share of the training pairs whose prompt is left empty.
        workers: Processes that read and decode, for each rank; 0 does it in the main process.
        seed: Seed of the order and whatever else is drawn for a sample.
        validation_pairs: How many pairs validation uses at most; none: all.
    """

    def __init__(
        self,
        batch_size: int = 64,
        caption_dropout: float = 0.1,
        workers: int = 0,
        seed: int = 0,
        validation_pairs: int | None = None,
        shards: str | list[str] | None = None,
    ) -> None:
        super().__init__(
            shards=shards or str(PAIRS / "train"),
            validation=str(PAIRS / "validation"),
            batch_size=batch_size,
            resolution=32,
            flip=False,  # a flip would make captions wrong
            caption_dropout=caption_dropout,
            workers=workers,
            seed=seed,
            validation_pairs=validation_pairs,
        )


class ToyPairGroups(PairGroups):
    """Captions and chosen images of the shipped training pairs, for self-play.

    Args:
        group_size: Prompts that are generated together, whole or not at all.
        count: Number of pairs; all by default.
        seed: Seed from which everything random about a prompt is drawn.
    """

    def __init__(self, group_size: int = 64, count: int | None = None, seed: int = 0) -> None:
        super().__init__(str(PAIRS / "train"), group_size, count, seed)


class ToySampleGroups(SampleGroups):
    """The shipped pairs, for generators that process each pair.

    Args:
        of: `train`, or `validation` for those on held-out captions.
        group_size: Pairs that are worked on together, whole or not at all.
        count: Number of pairs; all by default.
        seed: Seed from which everything random about a pair is drawn.
    """

    def __init__(
        self,
        of: Literal["train", "validation"] = "train",
        group_size: int = 64,
        count: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(str(PAIRS / of), group_size, count, seed)


class ToyStages(CurriculumPairs):
    """Pairs of the toy world in stages; validation on the shipped held-out pairs.

    Args:
        stages: Output of `lit-prefopt shards stages`, or a list of the stages, easiest first.
        stage_steps: Optimizer steps of a stage.
        batch_size: Pairs in a batch of one rank.
        caption_dropout: Share of the training pairs whose prompt is left empty.
        workers: Processes that read and decode, for each rank; 0 does it in the main process.
        seed: Seed of the order and whatever else is drawn for a sample.
        validation_pairs: How many pairs validation uses at most; none: all.
    """

    def __init__(
        self,
        stages: str | list[str],
        stage_steps: int = 20,
        batch_size: int = 64,
        caption_dropout: float = 0.1,
        workers: int = 0,
        seed: int = 0,
        validation_pairs: int | None = None,
    ) -> None:
        super().__init__(
            stages=stages,
            stage_steps=stage_steps,
            validation=str(PAIRS / "validation"),
            batch_size=batch_size,
            resolution=32,
            flip=False,  # a flip would make captions wrong
            caption_dropout=caption_dropout,
            workers=workers,
            seed=seed,
            validation_pairs=validation_pairs,
        )


class ToyCollections(PromptCollections):
    """Training captions for on-policy methods; validation on the shipped held-out pairs.

    Args:
        batch_size: Pairs in a batch of one rank.
        batches: Batches between two collections.
        round_size: Prompts that each rank rolls out at a time.
        collection: Pairs (or prompts, if whole roll-outs are stored) per collection and rank; by
            default as many as its batches need.
        keep: Maximum that each rank stores; by default nothing from earlier collections.
        count: Number of captions.
        validation_pairs: Maximum number of held-out pairs; all by default.
        seed: Seed of the order and of the roll-outs.
    """

    def __init__(
        self,
        batch_size: int = 32,
        batches: int = 8,
        round_size: int = 16,
        collection: int | None = None,
        keep: int | None = None,
        count: int = 2048,
        validation_pairs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            prompts=ToyPrompts(count, "train"),
            batch_size=batch_size,
            batches=batches,
            round_size=round_size,
            collection=collection,
            keep=keep,
            validation=str(PAIRS / "validation"),
            resolution=32,
            validation_pairs=validation_pairs,
            seed=seed,
        )

"""The toy world's data: the shipped preference pairs, and captions to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
        batch_size: Pairs in a batch of one rank.
        caption_dropout: Share of the training pairs whose prompt is replaced by the empty one.
        workers: Processes of each rank that read and decode; 0 reads in the main process.
        shards: Other pairs to train on, as `PairShards` takes them.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        caption_dropout: float = 0.1,
        workers: int = 0,
        shards: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            shards=shards or str(PAIRS / "train"),
            validation=str(PAIRS / "validation"),
            batch_size=batch_size,
            resolution=32,
            flip=False,  # a flip would make captions wrong
            caption_dropout=caption_dropout,
            workers=workers,
            **kwargs,
        )


class ToyPairGroups(PairGroups):
    """Captions and chosen images of the shipped training pairs, for self-play.

    Args:
        group_size: Prompts of a group, which is generated whole or not at all.
    """

    def __init__(self, *, group_size: int = 64, **kwargs: Any) -> None:
        super().__init__(str(PAIRS / "train"), group_size=group_size, **kwargs)


class ToySampleGroups(SampleGroups):
    """The shipped pairs, to encode or corrupt each.

    Args:
        of: `train`, or `validation` for those on held-out captions.
        group_size: Pairs of a group, which is processed whole or not at all.
    """

    def __init__(
        self,
        of: Literal["train", "validation"] = "train",
        *,
        group_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(str(PAIRS / of), group_size=group_size, **kwargs)


class ToyStages(CurriculumPairs):
    """Pairs of the toy world in stages; validation on the shipped held-out pairs.

    Args:
        stage_steps: Optimizer steps of a stage.
        batch_size: Pairs in a batch of one rank.
        caption_dropout: Share of the training pairs whose prompt is replaced by the empty one.
        workers: Processes of each rank that read and decode; 0 reads in the main process.
    """

    def __init__(
        self,
        *,
        stage_steps: int = 20,
        batch_size: int = 64,
        caption_dropout: float = 0.1,
        workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            stage_steps=stage_steps,
            validation=str(PAIRS / "validation"),
            batch_size=batch_size,
            resolution=32,
            flip=False,  # a flip would make captions wrong
            caption_dropout=caption_dropout,
            workers=workers,
            **kwargs,
        )


class ToyCollections(PromptCollections):
    """Training captions for on-policy methods; validation on the shipped held-out pairs.

    Args:
        batch_size: Pairs in a batch of one rank.
        batches: Batches between two collections.
        round_size: Prompts that each rank rolls out at a time.
        count: Number of captions.
    """

    def __init__(
        self,
        batch_size: int = 32,
        batches: int = 8,
        round_size: int = 16,
        count: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            prompts=ToyPrompts(count, "train"),
            batch_size=batch_size,
            batches=batches,
            round_size=round_size,
            validation=str(PAIRS / "validation"),
            resolution=32,
            **kwargs,
        )

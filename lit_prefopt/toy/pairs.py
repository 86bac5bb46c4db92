"""The toy world's data: the shipped preference pairs, and captions to evaluate on."""

from __future__ import annotations

from pathlib import Path

from lit_prefopt.data import PairShards
from lit_prefopt.evaluate.prompts import Prompts
from lit_prefopt.toy.scenes import Split, prompts

PAIRS = Path(__file__).parent / "pairs"


class ToyPrompts(Prompts):
    """Captions of the toy world in a fixed order.

    Args:
        count: How many.
        of: `train`, or `held-out` for captions that no training has seen.
    """

    def __init__(self, count: int = 256, of: Split = "held-out") -> None:
        self.count, self.of = count, of

    def texts(self) -> list[str]:
        """Return the captions."""
        return prompts(self.count, self.of)


class ToyPairs(PairShards):
    """The shipped pairs: 1,024 for training, 256 on held-out captions for validation.

    Args:
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
    ) -> None:
        super().__init__(
            shards=str(PAIRS / "train"),
            validation=str(PAIRS / "validation"),
            batch_size=batch_size,
            resolution=32,
            flip=False,  # a flip would make captions wrong
            caption_dropout=caption_dropout,
            workers=workers,
            seed=seed,
            validation_pairs=validation_pairs,
        )

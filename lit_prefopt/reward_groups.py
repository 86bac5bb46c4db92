"""Advantages of images within their prompt's group, collected or stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_prefopt.batches import Pairs
from lit_prefopt.errors import InputError
from lit_prefopt.reward_losses import LEAST, LIMIT, Deviation, apart, centred, group_advantages

Sum = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all ranks."""


class Groups(NamedTuple):
    """How scores become advantages within each prompt's group.

    Args:
        deviation: `group` divides by the standard deviation of the prompt's own scores, `global`
            by that of all scores of a collection (of stored images: of a batch) on all ranks.
    """

    deviation: Deviation

    def advantages(self, scores: Tensor, ranks: Sum) -> Tensor:
        """Return the advantages of complete groups, (B, M) float32.

        Args:
            scores: Scores of the M images of each prompt, (B, M).
            ranks: Returns the sum of a tensor over all ranks.
        """
        if self.deviation == "group":
            return group_advantages(scores)
        return group_advantages(scores, spread([scores], ranks).to(scores.device))

    def weigh(self, pairs: Pairs, ranks: Sum) -> Pairs:
        """Return stored images with advantages, and weight 0 where all scores are equal.

        Args:
            pairs: B samples, whose sides are images of one prompt.
            ranks: Returns the sum of a tensor over all ranks.

        Raises:
            InputError: They have no scores.
        """
        if pairs.scores is None or pairs.sides < 2:
            raise InputError(
                "The method needs two or more images of each prompt with a score for each: convert "
                "data that have them, or take a method for pairs."
            )
        weights = pairs.weights * apart(pairs.scores)
        return pairs._replace(advantages=self.advantages(pairs.scores, ranks), weights=weights)

    def begin(self, scores: Tensor) -> Tensor:
        """Return advantages (B, M) of a round; before `finish`, global ones are not divided yet."""
        return group_advantages(scores) if self.deviation == "group" else centred(scores).float()

    def finish(self, rounds: list[Any], ranks: Sum) -> list[Any]:
        """Return a collection's records, their advantages divided by the global deviation.

        Args:
            rounds: Records with `scores` and with the `advantages` that `begin` returned.
            ranks: Returns the sum of a tensor over all ranks.
        """
        if self.deviation == "group":
            return rounds
        by = float(spread([one.scores for one in rounds], ranks)) + LEAST
        limited = [(one.advantages / by).clamp(-LIMIT, LIMIT) for one in rounds]
        return [
            one._replace(advantages=values) for one, values in zip(rounds, limited, strict=True)
        ]


def group_means(scores: Tensor) -> dict[str, Tensor]:
    """Return logged means of a round: range of a prompt's scores, share of prompts without one.

    Args:
        scores: Scores of the M images of each prompt, (B, M).
    """
    return {
        "spread": (scores.amax(1) - scores.amin(1)).mean(),
        "alike": 1 - apart(scores).mean(),
    }


def spread(scores: list[Tensor], ranks: Sum) -> Tensor:
    """Return the standard deviation of all scores on all ranks, () float64.

    Args:
        scores: Tensors of any shape.
        ranks: Returns the sum of a tensor over all ranks.
    """
    values = torch.cat([part.flatten() for part in scores]).double().cpu()
    count, total = ranks(torch.stack([torch.ones_like(values).sum(), values.sum()]))
    return (ranks((values - total / count).square().sum()) / count).sqrt()


def over_ranks(module: LightningModule) -> Sum:
    """Return the function that sums a tensor over the ranks of a module's run, if it has one."""
    if module._trainer is None:
        return lambda value: value
    strategy = module.trainer.strategy
    return lambda value: strategy.reduce(value.to(strategy.root_device), reduce_op="sum").cpu()

"""Logged metrics: the same few numbers for every method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.losses import Comparisons


def accuracy(margin: Tensor) -> Tensor:
    """Return 1 where the margin is positive, one half where it is zero, else 0, (B,)."""
    return (margin.sign() + 1) / 2


@torch.no_grad()
def batch_means(
    ratios: LogRatios, pairs: Comparisons, loss: Tensor, beta: float
) -> dict[str, Tensor]:
    """Return the batch's means by name, without synchronising with the device.

    `gradient_factor` is sigmoid(-margin), the weight of a pair's gradient under the sigmoid link.
    """
    means = {"loss": loss.detach(), "t": ratios.t.float().mean()}
    if pairs.sides > 1:
        margin = ratios.margin(beta)
        means |= {
            "accuracy": accuracy(margin).mean(),
            "margin": margin.mean(),
            "gradient_factor": torch.sigmoid(-margin).mean(),
            "chosen_log_ratio": ratios.chosen.mean(),
            "rejected_log_ratio": ratios.rejected.mean(),
        }
    for name, errors in ratios.errors.items():
        means[name] = errors.mean()
        means[f"chosen_{name}"] = errors[:, 0].mean()
        if pairs.sides > 1:
            means[f"rejected_{name}"] = errors[:, -1].mean()
    return means | {name: term.mean() for name, term in (ratios.terms or {}).items()}


class RunningMeans:
    """Means over the batches since the last logged step, accumulated micro-batches included."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, means: dict[str, Tensor]) -> None:
        """Add the means of a batch."""
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.counts.update(means.keys())

    def close(self) -> dict[str, Tensor]:
        """Return the means and reset them."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, Counter()
        return means


class NamedMeans(Metric):
    """Means by name over all batches and ranks.

    Args:
        names: Names of all values that may be added.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = [*names]
        # One row for all names: all ranks reduce the same, whatever each has measured.
        self.add_state("sums", torch.zeros(len(self.names)), "sum")
        self.add_state("counts", torch.zeros(len(self.names)), "sum")

    @torch.no_grad()
    def update(self, measured: Mapping[str, Tensor]) -> None:
        """Add values of a batch, any number for each name."""
        for name, values in measured.items():
            self.sums[self.names.index(name)] += values.sum()
            self.counts[self.names.index(name)] += values.numel()

    def compute(self) -> dict[str, Tensor]:
        """Return the means of all names that have values."""
        rows = zip(self.names, self.sums, self.counts, strict=True)
        return {name: total / count for name, total, count in rows if count > 0}

    def chance_95(self, name: str, draws: int) -> Tensor:
        """Return the upper end of the 95 % range of an accuracy by chance.

        A normal approximation over pairs, since draws of one pair are not independent.

        Args:
            name: Name of the accuracy.
            draws: Number of values of each pair.
        """
        pairs = self.counts[self.names.index(name)] / draws
        return 0.5 + 1.96 * 0.5 / pairs.sqrt()


class PreferenceMetric(NamedMeans):
    """Held-out preference accuracy and margin, also by bin of the noise level (bin 0: cleanest).

    Args:
        draws: Number of draws of each pair.
        bins: Number of equal ranges of the level's place in the schedule.
    """

    def __init__(self, draws: int = 1, bins: int = 4) -> None:
        names = ["loss", "accuracy", "margin", "error", "reference_error"]
        super().__init__([*names, *(f"accuracy_t{b}" for b in range(bins))])
        self.draws, self.bins = draws, bins

    @torch.no_grad()
    def update(  # type: ignore[override]
        self,
        ratios: LogRatios,
        pairs: Pairs,
        beta: float,
        quantile: Tensor,
        losses: Tensor | None = None,
    ) -> None:
        """Add a batch of held-out pairs.

        Args:
            ratios: Log-ratios of the pairs' sides.
            pairs: The pairs.
            beta: Factor of margins.
            quantile: Place of each pair's noise level in the schedule, (B,) in [0, 1).
            losses: The loss of each pair, (B,), if the method has one for held-out pairs.
        """
        measured = ratios.errors | ({} if losses is None else {"loss": losses})
        if pairs.sides > 1:
            margin = ratios.margin(beta)
            right = accuracy(margin)
            measured |= {"accuracy": right, "margin": margin}
            bins = (quantile * self.bins).long()
            measured |= {f"accuracy_t{b}": right[bins == b] for b in range(self.bins)}
        super().update(measured)

    def compute(self) -> dict[str, Tensor]:
        """Return the means of all names that have values, and the range of chance."""
        means = super().compute()
        if "accuracy" in means:
            means["chance_95"] = self.chance_95("accuracy", self.draws)
        return means

"""Mixtures of judges: weighted sums of their scores, raw or standardized."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lit_prefopt.data.images import decode, from_pil
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.judges.judge import Judge, checked_scores


class WeightedJudges(Judge):
    """Weighted sum of several judges' scores; each judge's own scores are its attributes, by name.

    Args:
        judges: The judges.
        weights: Weight of each judge; by default equal, with a sum of 1.
    """

    def __init__(self, judges: list[Judge], weights: list[float] | None = None) -> None:
        if not judges:
            raise InputError("A mixture needs judges: give at least one as `judges`.")
        self.judges = list(judges)
        self.weights = judge_weights(self.judges, weights)
        self._last: tuple[Any, ...] = ()

    def prepare(self) -> None:
        """Load all judges."""
        for judge in self.judges:
            judge.prepare()

    def settings(self) -> dict[str, Any]:
        """Return the settings that an evaluation saves, of all judges."""
        settings = [judge.settings() for judge in self.judges]
        return {"class": type(self).__name__, "judges": settings, "weights": self.weights}

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,), for judges that are step-aware.
        """
        weights = torch.tensor(self.weights, dtype=torch.float64)
        columns = self.scaled(self._scores(images, texts, t))
        return (columns.double().cpu() @ weights).float().to(images.device)

    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return each judge's own scores, unscaled and unweighted, each (B,)."""
        columns = self._scores(images, texts, None).unbind(1)
        return dict(zip(judge_names(self.judges), columns, strict=True))

    def scaled(self, scores: Tensor) -> Tensor:
        """Scale the scores (B, J) before the sum; identity by default."""
        return scores

    def _scores(self, images: Tensor, texts: Sequence[str], t: Tensor | None) -> Tensor:
        """Return all judges' scores, (B, J); repeated inputs are cached."""
        key: Any = None
        if not images.is_inference():  # inference tensors have no version counter
            key = (images._version, tuple(texts), None if t is None else tuple(t.tolist()))
        if key and self._last and self._last[0]() is images and self._last[1] == key:
            return self._last[2]
        columns = torch.stack([checked_scores(j, images, texts, t) for j in self.judges], 1)
        self._last = (weakref.ref(images), key, columns)
        return columns


class CalibratedJudges(WeightedJudges):
    """Weighted sum of standardized scores: minus their mean, divided by their deviation.

    Means and deviations are given, or measured once, at the first score, on stored images.

    Args:
        judges: The judges.
        weights: Weight of each judge's standardized scores; by default equal, with a sum of 1.
        means: Mean of each judge's scores, in its own unit.
        deviations: Standard deviation of each judge's scores.
        measured_on: Pair shards, as `--data.shards` takes them, on whose first images means and
            deviations are measured, if they are not given.
        images: Number of images for this measurement.
    """

    def __init__(
        self,
        judges: list[Judge],
        weights: list[float] | None = None,
        means: list[float] | None = None,
        deviations: list[float] | None = None,
        measured_on: str | None = None,
        images: int = 256,
    ) -> None:
        super().__init__(judges, weights)
        check_number("images", images, 2)
        stated = [column for column in (means, deviations) if column is not None]
        if len(stated) != (0 if measured_on else 2) or any(
            len(column) != len(judges) for column in stated
        ):
            raise InputError(
                "CalibratedJudges needs means and deviations: give both, one number for each "
                "judge, or name pair shards as `measured_on` and give neither."
            )
        for deviation in deviations or []:
            check_number("deviations", deviation, above=0)
        self.means, self.deviations = means, deviations
        self.measured_on, self.images = measured_on, images

    def prepare(self) -> None:
        """Load all judges, and check the shards."""
        super().prepare()
        if self.measured_on is not None and self.means is None:
            self._samples()

    def settings(self) -> dict[str, Any]:
        """Return the settings that an evaluation saves; means are measured at the first score."""
        on = {"measured_on": self.measured_on, "images": self.images} if self.measured_on else {}
        scale = {"means": self.means, "deviations": self.deviations}
        return super().settings() | on | scale

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,), for judges that are step-aware.
        """
        if self.means is None:
            self._measure(images.device)
        return super().score(images, texts, t)

    def scaled(self, scores: Tensor) -> Tensor:
        """Standardize scores (B, J) by the judges' means and deviations."""
        mean, deviation = torch.tensor(
            [self.means, self.deviations], dtype=torch.float64, device="cpu"
        )
        return (scores.double().cpu() - mean) / deviation

    def _measure(self, device: torch.device) -> None:
        """Measure mean and deviation of each judge's scores on the first images."""
        by_size: dict[tuple[int, ...], list[tuple[Tensor, str]]] = defaultdict(list)
        for image, text in islice(self._samples(), self.images):
            by_size[tuple(image.shape)].append((image, text))
        rows = []
        for some in by_size.values():
            for start in range(0, len(some), 16):  # images of one size, so that they stack
                images, texts = zip(*some[start : start + 16], strict=True)
                rows.append(self._scores(torch.stack(images).to(device), texts, None).double())
        scores = torch.cat(rows).cpu()
        deviations = scores.std(0, correction=0)
        if len(scores) < 2 or not deviations.min() > 0:
            raise InputError(
                f"A judge has equal scores for all {len(scores)} images of {self.measured_on}: "
                "name shards with different images as `measured_on`."
            )
        self.means, self.deviations = scores.mean(0).tolist(), deviations.tolist()

    def _samples(self) -> Iterable[tuple[Tensor, str]]:
        """Yield images (3, H, W) in [-1, 1] with their prompts, pair by pair."""
        reader = ShardReader(find_shards(self.measured_on or "")).check()

        def read() -> Iterable[tuple[Tensor, str]]:
            for shard, count in enumerate(reader.counts):
                for number in range(count):
                    sample: Sample = reader(shard, number)
                    for side in sample.sides:
                        yield from_pil(decode(side)), sample.text

        return read()


def judge_names(judges: Sequence[Judge]) -> list[str]:
    """Return the judges' class names, numbered from the second of a class on."""
    seen: Counter[str] = Counter()
    names = []
    for name in (type(judge).__name__ for judge in judges):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return names


def judge_weights(judges: Sequence[Judge], weights: list[float] | None) -> list[float]:
    """Return a weight for each judge; by default equal ones with a sum of 1.

    Args:
        judges: At least one.
        weights: The given weights, or None.

    Raises:
        InputError: They are not one positive number for each judge.
    """
    if weights is None:
        return [1 / len(judges)] * len(judges)
    if len(weights) != len(judges):
        raise InputError(
            f"There are {len(weights)} `weights` for {len(judges)} judges; give each judge one."
        )
    for weight in weights:
        check_number("weights", weight, above=0)
    return [float(weight) for weight in weights]

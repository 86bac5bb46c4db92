"""Ranked generation: sample several images per prompt, score them by judges, and form pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.images import to_pil
from lit_prefopt.data.shards.writer import encode
from lit_prefopt.datamodules.generation import GenerationGroup
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.generate.generator import GeneratedPair, Generator
from lit_prefopt.generate.selection import (
    How,
    PairIndices,
    calibrated,
    draw_subset,
    ranks,
    select_pairs,
)
from lit_prefopt.judges import Judge
from lit_prefopt.judges.judge import checked_scores, full_precision
from lit_prefopt.judges.mixture import judge_names, judge_weights
from lit_prefopt.processes.settings import Sampling


class ScoredImages(NamedTuple):
    """The M images of one prompt with the scores of K judges."""

    pictures: list[Image.Image]
    seeds: list[int]
    scores: Tensor  # (M, K)
    total: Tensor  # (M,)


class RankedSamples(Generator):
    """Samples several images per prompt, scores them by judges, and pairs them.

    Images of equal score never form a pair. A pair's .json has the seeds, scores and ranks (from
    1, the best) of both sides, their gap, and the number of ranked images; `lit-prefopt shards
    stages` splits the pairs into a curriculum.

    Args:
        backbone: The model that is sampled; given as the recipe's own key `backbone`.
        output: Output folder of pair shards.
        judge: Scores the images, one judge or a list of them.
        images: Number of images per prompt (M).
        pairs: Which images to pair: `all`; `best-worst`, the best against the worst; `rank-gap`,
            all whose ranks are at least `rank_gap` apart; `pareto`, for several judges: each
            Pareto-optimal image against each that dominates none; one image dominates another if
            all judges score it at least as high and one scores it higher.
        rank_gap: Minimum difference of two ranks with `rank-gap`, from 1 to M - 1.
        pairs_per_prompt: Maximum number of pairs per prompt, a random subset; all by default.
        weights: Weights of the judges' scores in the ranking score; equal by default.
        calibrate: Replace each score by the mean probability that the image is preferred to the
            others of its prompt, the mean of sigmoid(difference of the scores), as CaPO (arXiv
            2502.02588) does, so that judges of any scale can be summed.
        sampling: Sampler settings; the backbone's own by default.
        negative: LoRA file, denoiser's folder, checkpoint or run of a negative model
            (`--model.swapped true`), whose prediction takes the place of the one without prompt in
            guidance.
        negative_merge: 0 adds the negative model to the weights that are sampled, 1 to the base.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        judge: Judge | list[Judge],
        images: int,
        pairs: How = "all",
        rank_gap: int = 1,
        pairs_per_prompt: int | None = None,
        weights: list[float] | None = None,
        calibrate: bool = False,
        sampling: Sampling | None = None,
        negative: str | None = None,
        negative_merge: float = 0.0,
    ) -> None:
        super().__init__(backbone, output, sampling, negative, negative_merge)
        self.judges = [judge] if isinstance(judge, Judge) else list(judge)
        check_number("images", images, 2)
        check_number("rank_gap", rank_gap, 1)
        check_number("pairs_per_prompt", pairs_per_prompt, 1, optional=True)
        if rank_gap >= images:
            raise InputError(
                f"Ranks of {images} images are at most {images - 1} apart, not {rank_gap}; raise "
                "`images` or lower `rank_gap`."
            )
        self.images, self.pairs, self.rank_gap = images, pairs, rank_gap
        self.pairs_per_prompt, self.calibrate = pairs_per_prompt, calibrate
        if not self.judges:
            raise InputError("There is no judge to rank the images; name one with `--model.judge`.")
        self.weights = judge_weights(self.judges, weights)

    def setup(self, stage: str | None = None) -> None:
        """Load the judges, and check an existing output."""
        for judge in self.judges:
            judge.prepare()
        super().setup(stage)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, besides weights, prompts and sampling."""
        return {
            "judges": [judge.settings() for judge in self.judges],
            "judge_weights": self.weights,
            "images": self.images,
            "pairs": self.pairs,
            "rank_gap": self.rank_gap,
            "pairs_per_prompt": self.pairs_per_prompt,
            "calibrate": self.calibrate,
        }

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return the pairs of a group."""
        made: list[GeneratedPair] = []
        rated = self._rated(group)
        for place, text, seed, one in zip(
            group.indices, group.texts, group.seeds.tolist(), rated, strict=True
        ):
            found = select_pairs(one.scores, one.total, self.pairs, self.rank_gap)
            if not found:
                self.left_out["prompts without a pair"] += 1
            kept = draw_subset(found, self.pairs_per_prompt, draws.generator(seed, "pairs"))
            if len(kept) < len(found):
                self.left_out["pairs beyond pairs_per_prompt"] += len(found) - len(kept)
            # an image may be in several pairs, but is encoded once
            files = {i: encode(one.pictures[i])[0] for match in kept for i in match}
            made += [
                GeneratedPair(place, text, files[m.chosen], files[m.rejected], self._meta(one, m))
                for m in kept
            ]
        return made

    def _rated(self, group: GenerationGroup) -> list[ScoredImages]:
        """Sample and score the images of each prompt."""
        texts = [text for text in group.texts for _ in range(self.images)]
        seeds = draws.subseeds(group.seeds, self.images, "ranked").flatten()
        pictures: list[Image.Image] = []
        scores = []
        size = self.sampling.batch_size
        for first in range(0, len(texts), size):  # a batch at a time, to bound memory
            some = texts[first : first + size]
            images = sample(self.backbone, some, seeds[first : first + size], self.sampling)
            with full_precision(images) as seen:
                rows = [checked_scores(judge, seen, some).cpu() for judge in self.judges]
            scores.append(torch.stack(rows, 1))
            pictures += map(to_pil, images)
        by_prompt = torch.cat(scores).split(self.images)
        return [
            ScoredImages(
                pictures[i * self.images : (i + 1) * self.images],
                seeds[i * self.images : (i + 1) * self.images].tolist(),
                some,
                self._total(some),
            )
            for i, some in enumerate(by_prompt)
        ]

    def _total(self, scores: Tensor) -> Tensor:
        """Return the ranking score, (M,) float64."""
        values = scores.double()
        weighed = calibrated(values) if self.calibrate else values
        return weighed @ torch.tensor(self.weights, dtype=torch.float64)

    def _meta(self, rated: ScoredImages, match: PairIndices) -> dict[str, Any]:
        """Return the metadata for a pair's .json."""
        by_judge = zip(judge_names(self.judges), rated.scores.T.tolist(), strict=True)
        places = ranks(rated.total)
        total = [_digits(score) for score in rated.total.tolist()]
        return {
            "source": "ranked samples",
            "seeds": [rated.seeds[image] for image in match],
            "judges": {name: _sides(match, [*map(_digits, row)]) for name, row in by_judge},
            "scores": _sides(match, total),
            "gap": _digits(total[match.chosen] - total[match.rejected]),
            "ranks": _sides(match, [place + 1 for place in places]),
            "rank_gap": places[match.rejected] - places[match.chosen],
            "images": self.images,
        }


def _sides(match: PairIndices, values: Sequence[Any]) -> dict[str, Any]:
    return {"chosen": values[match.chosen], "rejected": values[match.rejected]}


def _digits(value: float) -> float:
    """Round a number to nine digits, which distinguish all float32 values."""
    return float(f"{value:.9g}")

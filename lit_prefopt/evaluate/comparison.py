"""Compare policy and reference on the same prompts, settings and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.rows import ComparisonRow, ImageScores
from lit_prefopt.evaluate.scoring import Scorers
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import PromptEntry, digest
from lit_prefopt.utils.seeds import stable_seed

ImageSampler = Callable[[list[str], Tensor], Tensor]
"""Samples one image for each of B texts and seeds (B,): (B, 3, H, W) in [-1, 1]."""

RULE = (
    "image 0 of prompt n has seed + n; image i > 0 has the first 31 bits of the 8 bytes "
    "blake2s('evaluate/SEED/n/i')"
)


class SampleRequest(NamedTuple):
    """One image to sample from both models."""

    prompt: int
    image: int
    entry: PromptEntry
    seed: int
    seed_reference: int


class SampleResult(NamedTuple):
    """A row, and both images (3, H, W) in [-1, 1] on the CPU."""

    row: ComparisonRow
    before: Tensor
    after: Tensor


@dataclass
class EvaluationPlan:
    """Prompts and seeds of an evaluation, in groups that are processed atomically.

    Args:
        entries: The prompts.
        seed: Seed from which all others are derived.
        images: Images per prompt.
        group_size: Prompts per group.
        reference_seed: Another seed for the reference; by default the same.
    """

    entries: Sequence[PromptEntry]
    seed: int = 0
    images: int = 1
    group_size: int = 16
    reference_seed: int | None = None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-len(self.entries) // self.group_size)

    def group(self, number: int) -> list[SampleRequest]:
        """Return the images of one group."""
        first = number * self.group_size
        last = min(first + self.group_size, len(self.entries))
        other = self.seed if self.reference_seed is None else self.reference_seed
        return [
            SampleRequest(
                n, i, self.entries[n], image_seed(self.seed, n, i), image_seed(other, n, i)
            )
            for n in range(first, last)
            for i in range(self.images)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the images, besides models and sampler."""
        return {
            "prompts_sha256": digest(entry.text for entry in self.entries),
            "categories_sha256": digest(entry.category or "" for entry in self.entries),
            "prompts": len(self.entries),
            "seed": self.seed,
            "reference_seed": self.reference_seed,
            "images_per_prompt": self.images,
            "group_size": self.group_size,
        }


def image_seed(seed: int, prompt: int, image: int) -> int:
    """Return the seed of an image, which depends only on these three numbers.

    So the number of prompts and images does not change other images.

    Args:
        seed: Of the evaluation.
        prompt: Number of the prompt in its set.
        image: Number of the image among the prompt's.
    """
    if image == 0:
        return seed + prompt
    return stable_seed("evaluate", seed, prompt, image) >> 32  # 31 bits, for other programs


def image_sampler(backbone: Backbone, how: Sampling) -> ImageSampler:
    """Return a function that samples the policy."""
    return lambda texts, seeds: sample(backbone, texts, seeds, how)


def reference_image_sampler(backbone: Backbone, how: Sampling) -> ImageSampler:
    """Return a function that samples the reference."""

    def sample_reference(texts: list[str], seeds: Tensor) -> Tensor:
        with backbone.as_reference():
            return sample(backbone, texts, seeds, how)

    return sample_reference


def repeated_images(sampler: ImageSampler) -> ImageSampler:
    """Return a sampler that returns its last images again for the same texts and seeds.

    So a model that is compared with itself is sampled once.
    """
    last: list[tuple[list[str], Tensor, Tensor]] = []

    def draw(texts: list[str], seeds: Tensor) -> Tensor:
        if not last or last[0][0] != texts or not torch.equal(last[0][1], seeds):
            last[:] = [(texts, seeds, sampler(texts, seeds))]
        return last[0][2]

    return draw


@torch.no_grad()
def compare(
    reference: ImageSampler,
    policy: ImageSampler,
    scorers: Scorers,
    requests: Sequence[SampleRequest],
    batch_size: int,
) -> list[SampleResult]:
    """Sample both models and score the images, a batch at a time.

    Args:
        reference: One model.
        policy: The other.
        scorers: Score the images.
        requests: Images to sample, all of each prompt.
        batch_size: Images per batch.
    """
    results: list[SampleResult] = []
    places: list[list[Tensor]] = [[], []]
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        texts = [one.entry.text for one in part]
        seeds = (
            torch.tensor([one.seed_reference for one in part]),
            torch.tensor([one.seed for one in part]),
        )
        images = [draw(texts, s) for draw, s in zip((reference, policy), seeds, strict=True)]
        scores = [scorers.score_images(side, texts) for side in images]
        for side, found in zip(images, places, strict=True):
            features = scorers.features(side)
            found += [] if features is None else [features]
        rows = [_row(one, *judged) for one, *judged in zip(part, *scores, strict=True)]
        results += [
            SampleResult(*a) for a in zip(rows, *(side.cpu() for side in images), strict=True)
        ]
    if places[0]:
        before, after = (torch.cat(found) for found in places)
        _measure([result.row for result in results], before, after)
    return results


def _row(one: SampleRequest, reference: ImageScores, policy: ImageScores) -> ComparisonRow:
    other = None if one.seed_reference == one.seed else one.seed_reference
    text, category = one.entry
    return ComparisonRow(text, one.seed, reference, policy, one.prompt, one.image, category, other)


def _measure(rows: Sequence[ComparisonRow], before: Tensor, after: Tensor) -> None:
    """Store the similarity of policy and reference, and among the images of a prompt.

    Args:
        rows: N rows of whole prompts.
        before: Normalized features of the reference's images, (N, D).
        after: Normalized features of the policy's images, (N, D).
    """
    same = torch.tensor([[a.prompt == b.prompt for b in rows] for a in rows]).fill_diagonal_(False)
    others = same.sum(1)
    for side, places in (("reference", before), ("policy", after)):
        alike = ((places @ places.T) * same).sum(1) / others
        for row, value, count in zip(rows, alike.tolist(), others.tolist(), strict=True):
            getattr(row, side).alike = value if count else None
    for row, value in zip(rows, (before * after).sum(1).tolist(), strict=True):
        row.similarity = value

"""Policy against reference: the same prompts, settings and seeds for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.rows import Compared, Judged
from lit_prefopt.evaluate.scoring import Panel
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import Entry, digest
from lit_prefopt.utils.seeds import stable_seed

Speaker = Callable[[list[str], Tensor], Tensor]
"""Makes one image for each of B texts and seeds (B,): (B, 3, H, W) in [-1, 1]."""

RULE = (
    "image 0 of prompt n has seed + n; image i > 0 has the first 31 bits of the 8 bytes "
    "blake2s('evaluate/SEED/n/i')"
)


class Asked(NamedTuple):
    """One image that both models are asked for."""

    prompt: int
    image: int
    entry: Entry
    seed: int
    seed_reference: int


class Answer(NamedTuple):
    """A row, and both images (3, H, W) in [-1, 1] on the CPU."""

    row: Compared
    before: Tensor
    after: Tensor


@dataclass
class Questions:
    """What both models are asked, in groups that are answered whole.

    Args:
        entries: The prompts.
        seed: What all seeds are made of.
        images: Images of each prompt.
        group_size: Prompts of a group.
        reference_seed: Another seed for the reference; the same where it is not given.
    """

    entries: Sequence[Entry]
    seed: int = 0
    images: int = 1
    group_size: int = 16
    reference_seed: int | None = None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-len(self.entries) // self.group_size)

    def group(self, number: int) -> list[Asked]:
        """Return the images of one group."""
        first = number * self.group_size
        last = min(first + self.group_size, len(self.entries))
        other = self.seed if self.reference_seed is None else self.reference_seed
        return [
            Asked(n, i, self.entries[n], image_seed(self.seed, n, i), image_seed(other, n, i))
            for n in range(first, last)
            for i in range(self.images)
        ]

    def facts(self) -> dict[str, Any]:
        """Return what decides the images, beside models and sampler."""
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
    """Return the seed of an image; it depends on nothing but these three.

    So fewer prompts or more images change no other image.

    Args:
        seed: Of the evaluation.
        prompt: Number of the prompt in its set.
        image: Number of the image among the prompt's.
    """
    if image == 0:
        return seed + prompt
    return stable_seed("evaluate", seed, prompt, image) >> 32  # short, as other programs want them


def speaker(backbone: Backbone, how: Sampling) -> Speaker:
    """Return what samples the policy."""
    return lambda texts, seeds: sample(backbone, texts, seeds, how)


def reference_speaker(backbone: Backbone, how: Sampling) -> Speaker:
    """Return what samples the reference."""

    def speak(texts: list[str], seeds: Tensor) -> Tensor:
        with backbone.as_reference():
            return sample(backbone, texts, seeds, how)

    return speak


@torch.no_grad()
def compare(
    reference: Speaker, policy: Speaker, panel: Panel, asked: Sequence[Asked], batch_size: int
) -> list[Answer]:
    """Sample both models and look at the images, a batch at a time.

    Args:
        reference: One model.
        policy: The other.
        panel: What looks at the images.
        asked: Whole prompts.
        batch_size: Images of a batch.
    """
    answers: list[Answer] = []
    places: list[list[Tensor]] = [[], []]
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts = [one.entry.text for one in part]
        seeds = (
            torch.tensor([one.seed_reference for one in part]),
            torch.tensor([one.seed for one in part]),
        )
        images = [speak(texts, s) for speak, s in zip((reference, policy), seeds, strict=True)]
        said = [panel.say(side, texts) for side in images]
        for side, found in zip(images, places, strict=True):
            features = panel.features(side)
            found += [] if features is None else [features]
        rows = [_row(one, *judged) for one, *judged in zip(part, *said, strict=True)]
        answers += [Answer(*a) for a in zip(rows, *(side.cpu() for side in images), strict=True)]
    if places[0]:
        before, after = (torch.cat(found) for found in places)
        _measure([answer.row for answer in answers], before, after)
    return answers


def _row(one: Asked, reference: Judged, policy: Judged) -> Compared:
    other = None if one.seed_reference == one.seed else one.seed_reference
    text, category = one.entry
    return Compared(text, one.seed, reference, policy, one.prompt, one.image, category, other)


def _measure(rows: Sequence[Compared], before: Tensor, after: Tensor) -> None:
    """Note how alike the images are, to each other and among those of a prompt.

    Args:
        rows: N rows of whole prompts.
        before: Places of the reference's images on the unit sphere, (N, D).
        after: Of the policy's.
    """
    same = torch.tensor([[a.prompt == b.prompt for b in rows] for a in rows]).fill_diagonal_(False)
    others = same.sum(1)
    for side, places in (("reference", before), ("policy", after)):
        alike = ((places @ places.T) * same).sum(1) / others
        for row, value, count in zip(rows, alike.tolist(), others.tolist(), strict=True):
            getattr(row, side).alike = value if count else None
    for row, value in zip(rows, (before * after).sum(1).tolist(), strict=True):
        row.similarity = value

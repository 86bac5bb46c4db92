"""Diptychs of the toy world: two panels that differ in one attribute of one object."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Generator

from lit_prefopt.batches import ImagePairs
from lit_prefopt.errors import InputError
from lit_prefopt.generate.corruptions import (
    CorruptedPrompt,
    Corruption,
    CorruptionTarget,
    choose_one,
)
from lit_prefopt.toy.flaws import blur, dim, draw_flaws
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import Scene, Split, captions, changes, parse, split
from lit_prefopt.toy.web import ToyWeb

TEMPLATE = "{left} | {right}"
"""The caption of a diptych; two captions of the toy world fit into its text encoder."""

OF_OBJECTS = ("colour", "shape", "size")


class ToyAttributes(Corruption):
    """Changes one attribute of one object of a toy caption.

    The corrupted caption is in the same split (train or held-out) as the prompt.

    Args:
        attributes: The attributes; captions with two objects do not contain their size.
    """

    WANTS = "an attribute that can be changed"

    def __init__(self, attributes: tuple[str, ...] = OF_OBJECTS) -> None:
        unknown = set(attributes) - set(OF_OBJECTS)
        if unknown or not attributes:
            raise InputError(
                f"The attributes to change are {', '.join(attributes) or 'none'}; choose from "
                f"{', '.join(OF_OBJECTS)}."
            )
        self.attributes = tuple(attributes)

    def corrupt(self, prompt: str, generator: Generator) -> CorruptedPrompt | None:
        """Return the prompt, and a caption whose scene differs in one attribute."""
        scene = parse(prompt)
        named = [a for a in self.attributes if a in scene.attributes and neighbours(scene, a)]
        if not named:
            return None
        attribute = choose_one(named, generator)
        other = choose_one(neighbours(scene, attribute), generator).caption()
        return CorruptedPrompt(prompt, other, CorruptionTarget(attribute, prompt, other))


@cache
def neighbours(scene: Scene, attribute: str) -> tuple[Scene, ...]:
    """Return the scenes of the same split that differ only in that attribute of one object."""
    side = split(scene.caption())
    return tuple(s for s in changes(scene, attribute) if split(s.caption()) == side)


def diptych_pictures(
    step: int,
    count: int,
    seed: int,
    wrong_caption: float = 0.0,
    flawed_picture: float = 0.0,
    two_objects: float = 0.5,
    caption_dropout: float = 0.0,
    of: Split = "train",
) -> ImagePairs:
    """Render batch number `step` of the diptychs of a seed; see `ToyDiptychWeb`."""
    generator = Generator().manual_seed((seed % 2**31) * 2**32 + step)
    draw = partial(torch.rand, count, generator=generator)
    change = ToyAttributes()
    texts, left, right = [], [], []
    for two, wrong in zip(
        (draw() < two_objects).tolist(), (draw() < wrong_caption).tolist(), strict=True
    ):
        text = choose_one(captions(of, two), generator)
        made = change.corrupt(text, generator) or CorruptedPrompt(
            text, text, CorruptionTarget("", text, text)
        )
        texts.append(TEMPLATE.format(left=made.left, right=made.right))
        left.append(parse(made.left))
        # the picture is wrong, not the caption: the right panel shows the left one's scene
        right.append(parse(made.left if wrong else made.right))
    sigma, light, displacement = draw_flaws(count, flawed_picture, generator)
    jitter = int(torch.randint(2**62, (), generator=generator))
    panels = [
        dim(blur(render(scenes, Generator().manual_seed(jitter), displacement), sigma), light)
        for scenes in (left, right)  # one jitter and one flaw for both panels
    ]
    dropped = (draw() < caption_dropout).tolist()
    return ImagePairs(
        images=torch.cat(panels, -1)[:, None],
        texts=["" if gone else text for gone, text in zip(dropped, texts, strict=True)],
        seeds=torch.randint(2**62, (count,), generator=generator),
        labels=torch.ones(count),
        weights=torch.ones(count),
        keys=[f"diptychs/{step * count + i:08d}" for i in range(count)],
    )


class ToyDiptychWeb(ToyWeb):
    """Images of two panels, 32 x 64 pixels, to train a base model for diptychs.

    The panels share a scene, its jitter and its flaw; the right one differs in at most one
    attribute of one object. Inpainting the second panel instead would need a UNet of nine
    channels, which no checkpoint of the toy world has.

    Args:
        batch_size: Pictures in a batch.
        steps: Batches in an epoch, on each rank.
        wrong_caption: Share of images whose right panel is equal to the left one.
        flawed_picture: Share of pictures of which both panels are blurred, dim or displaced.
        two_objects: Share of pictures with two objects in each panel.
        caption_dropout: Share of captions replaced by "", which guidance needs.
        seed: Seed of all random draws.
        workers: Processes that render; 0 renders in the training process.
        val_steps: Batches of clean pictures with held-out captions for validation; 0 for none.
    """

    pictures = staticmethod(diptych_pictures)

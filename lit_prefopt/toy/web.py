"""Imperfect web data of the toy world: captioned images, many of them wrong or flawed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from lit_prefopt.batches import ImagePairs
from lit_prefopt.errors import InputError
from lit_prefopt.toy.flaws import blur, dim, draw_flaws
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import Scene, Split, captions, changes, parse


def web_pictures(
    step: int,
    count: int,
    seed: int,
    wrong_caption: float = 0.0,
    flawed_picture: float = 0.0,
    two_objects: float = 0.5,
    caption_dropout: float = 0.0,
    of: Split = "train",
) -> ImagePairs:
    """Render batch number `step` of a seed's web; see `ToyWeb`."""
    # both numbers in one seed: no run has 2**32 steps
    generator = Generator().manual_seed((seed % 2**31) * 2**32 + step)
    draw = partial(torch.rand, count, generator=generator)
    pick = torch.randint(2**31, (count, 3), generator=generator).tolist()
    texts, scenes = [], []
    for two, wrong, (one, other, third) in zip(
        (draw() < two_objects).tolist(), (draw() < wrong_caption).tolist(), pick, strict=True
    ):
        pool = captions(of, two)
        texts.append(pool[one % len(pool)])
        scene = parse(texts[-1])
        # the image is changed, not the caption: held-out captions never occur
        scenes.append(_changed(scene, other, third) if wrong else scene)
    sigma, light, displacement = draw_flaws(count, flawed_picture, generator)
    images = dim(blur(render(scenes, generator, displacement), sigma), light)
    dropped = (draw() < caption_dropout).tolist()
    return ImagePairs(
        images=images[:, None],
        texts=["" if gone else text for gone, text in zip(dropped, texts, strict=True)],
        seeds=torch.randint(2**62, (count,), generator=generator),
        labels=torch.ones(count),
        weights=torch.ones(count),
        keys=[f"web/{step * count + i:08d}" for i in range(count)],
    )


def _changed(scene: Scene, which: int, how: int) -> Scene:
    others = changes(scene, scene.attributes[which % len(scene.attributes)])
    return others[how % len(others)]


class ToyWeb(LightningDataModule):
    """The toy world's training images, one side each, rendered during training.

    Real image models are trained on web data with wrong captions and poor images, which leaves
    room for improvement by preference methods. Batch number s depends only on the seed and s, so
    a resumed run has the same batches as an uninterrupted one.

    Args:
        batch_size: Pictures in a batch.
        steps: Batches in an epoch, on each rank.
        wrong_caption: Share of pictures that differ from their caption in one attribute.
        flawed_picture: Share of pictures that are blurred, dim or displaced.
        two_objects: Share of pictures with two objects.
        caption_dropout: Share of captions replaced by "", which guidance needs.
        seed: Seed of all random draws.
        workers: Processes that render; 0 renders in the training process.
        val_steps: Batches of clean pictures with held-out captions for validation; 0 for none.
    """

    pictures = staticmethod(web_pictures)
    """Function that renders one batch."""

    def __init__(
        self,
        batch_size: int = 64,
        steps: int = 2500,
        wrong_caption: float = 1 / 3,
        flawed_picture: float = 0.5,
        two_objects: float = 0.5,
        caption_dropout: float = 0.1,
        seed: int = 0,
        workers: int = 0,
        val_steps: int = 0,
    ) -> None:
        super().__init__()
        shares = (wrong_caption, flawed_picture, two_objects, caption_dropout)
        if not all(0 <= share <= 1 for share in shares):
            raise InputError(f"the shares of ToyWeb are {shares}; choose each between 0 and 1")
        if batch_size < 1 or steps < 1:
            raise InputError("ToyWeb has no batches; set batch_size and steps to at least 1")
        self.batch_size, self.steps = batch_size, steps
        self.workers = workers
        self.val_steps = val_steps
        draw = partial(self.pictures, count=batch_size, two_objects=two_objects)
        self._train = _WebBatches(
            partial(
                draw,
                seed=seed,
                wrong_caption=wrong_caption,
                flawed_picture=flawed_picture,
                caption_dropout=caption_dropout,
            )
        )
        # a fixed seed: runs with different seeds are validated on the same images
        self._val = _WebBatches(partial(draw, seed=0, of="held-out"))

    def train_dataloader(self) -> _ResumedBatches:
        """Return the remaining batches of the epoch."""
        return _ResumedBatches(self)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return clean images with held-out captions, the same at every validation."""
        if not self.val_steps:
            return []
        return DataLoader(self._val, batch_size=None, sampler=range(self.val_steps))

    def batches(self, numbers: range) -> DataLoader:
        """Return the training batches of these numbers."""
        return DataLoader(self._train, batch_size=None, sampler=numbers, num_workers=self.workers)


class _WebBatches(Dataset[ImagePairs]):
    """Map-style dataset of batches, each a function of its number."""

    def __init__(self, batch: partial[ImagePairs]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> ImagePairs:
        return self.batch(step)


class _ResumedBatches:
    """Batches of one epoch on this rank, starting at Lightning's batch counter.

    Not a DataLoader, so that Lightning does not replace its sampler: the ranks already read
    different batches.
    """

    def __init__(self, web: ToyWeb) -> None:
        self.web = web

    def __len__(self) -> int:
        return self.web.steps

    def __iter__(self) -> Iterator[ImagePairs]:
        trainer = self.web.trainer
        if trainer is None:
            raise InputError("ToyWeb has no Trainer yet: give it to `Trainer.fit(module, data)`.")
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        end = (done // len(self) + 1) * len(self)
        ranks = trainer.world_size
        first, last = done * ranks + trainer.global_rank, end * ranks
        return iter(self.web.batches(range(first, last, ranks)))

    def state_dict(self) -> dict[str, int]:
        """Return the epoch's length, for a check; the position is Lightning's batch counter."""
        return {"steps": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raise InputError if the epoch's length differs, which would change the position."""
        if state != self.state_dict():
            raise InputError(
                f"the checkpoint was made with {state['steps']} steps an epoch, not {len(self)};"
                " resume with the same `steps` of ToyWeb"
            )

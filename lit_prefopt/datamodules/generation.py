"""The data modules of generators: prompts in fixed groups, each made whole or not at all."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from hashlib import blake2s
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor

from lit_prefopt.data.images import BrokenSample, open_image
from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.loading.image_samples import prompt_of
from lit_prefopt.data.order.plan import Plan
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.prompts.base import Prompts
from lit_prefopt.utils.seeds import stable_seed

log = logging.getLogger(__name__)


class GenerationGroup(NamedTuple):
    """Prompts that are generated together: what one of them becomes may depend on the others."""

    number: int  # place of the group in the list of groups
    indices: list[int]  # places of its B prompts in the list of prompts
    texts: list[str]  # B prompts
    seeds: Tensor  # (B,) int64: all that is random about what is made for a prompt
    images: list[bytes | None]  # B encoded images, where there are any beforehand


class StoredGroup(NamedTuple):
    """Stored samples that are worked on together."""

    number: int  # place of the group in the list of groups
    places: range  # of all its samples in the list of samples, those that are broken included
    indices: list[int]  # places of the B samples that can be read
    shards: list[int]  # numbers of the shards that they lie in
    samples: list[Any]  # B samples, as their reader returns them
    seeds: Tensor  # (B,) int64


class GenerationDataModule(LightningDataModule):
    """Deals out groups to the ranks; which prompts are in a group does not depend on the ranks.

    Args:
        group_size: Prompts of a group.
        seed: Seed from which everything random about a prompt is drawn.
    """

    def __init__(self, group_size: int, seed: int) -> None:
        super().__init__()
        check_number("group_size", group_size, 1)
        self.group_size, self.seed = group_size, seed

    @property
    @abstractmethod
    def total_prompts(self) -> int:
        """Number of prompts."""

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return what is at a place of the list: the prompt and, where there is one, its image.

        Raises:
            BrokenSample: It cannot be used, and is left out.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short text that two lists share only if they have the same prompts."""

    def settings(self) -> dict[str, str | int]:
        """Return what decides which prompts are generated together, and from which seeds."""
        return {"prompts": self.fingerprint(), "group_size": self.group_size, "seed": self.seed}

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-self.total_prompts // self.group_size)

    def group(self, number: int) -> Any:
        """Return one group, without what cannot be read; here a `GenerationGroup`."""
        found = self.readable(self.places(number))
        texts, images = [text for text, _ in found.values()], [i for _, i in found.values()]
        return GenerationGroup(number, list(found), texts, self.seeds(found), images)

    def places(self, number: int) -> range:
        """Return the places of a group's members in the list."""
        first = number * self.group_size
        return range(first, min(first + self.group_size, self.total_prompts))

    def readable(self, places: Iterable[int]) -> dict[int, Any]:
        """Return what is at some places of the list, by place, without what cannot be read."""
        found: dict[int, Any] = {}
        for index in places:
            try:
                found[index] = self.read(index)
            except BrokenSample as error:
                log.warning("A sample cannot be read and is left out: %s.", error)
        return found

    def seeds(self, places: Iterable[int]) -> Tensor:
        """Return the seeds of some places of the list, (B,) int64."""
        seeds = [stable_seed("generate", self.seed, index) for index in places]
        return torch.tensor(seeds, dtype=torch.int64)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """Leave a group as it is: Lightning would look at every byte of its images."""
        return batch

    def predict_dataloader(self) -> _RankGroups:
        """Return the groups of this rank."""
        return _RankGroups(self)


class _RankGroups:
    """The groups of a rank; no DataLoader, so that Lightning puts no sampler around it."""

    def __init__(self, groups: GenerationDataModule) -> None:
        self.groups = groups
        trainer = groups.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        self.numbers = range(rank, groups.groups, world)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return map(self.groups.group, self.numbers)


class PromptGroups(GenerationDataModule):
    """Prompts to generate for.

    Args:
        prompts: The prompts; one that comes twice is generated for twice.
        group_size: Prompts that are generated together, whole or not at all.
        seed: Seed from which everything random about a prompt is drawn.
    """

    def __init__(self, prompts: Prompts, group_size: int = 16, seed: int = 0) -> None:
        super().__init__(group_size, seed)
        self.prompts = prompts

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts."""
        self.entries = self.prompts.entries()
        self.texts = [entry.text for entry in self.entries]
        if not self.texts:
            raise InputError("There is no prompt to generate for: name others by `--data.prompts`.")

    @property
    def total_prompts(self) -> int:
        """Number of prompts."""
        return len(self.texts)

    def fingerprint(self) -> str:
        """Return a short text that two lists share only if they have the same prompts."""
        return blake2s(json.dumps(self.texts).encode(), digest_size=8).hexdigest()

    def read(self, index: int) -> tuple[str, bytes | None]:
        """Return the prompt at a place of the list; there is no image."""
        return self.texts[index], None


class PairGroups(GenerationDataModule):
    """Prompts of pair shards, each with its chosen image.

    Args:
        shards: Folder or URL of pair shards, or a list of them, as `fit` takes them.
        group_size: Prompts that are generated together, whole or not at all.
        count: How many of the pairs to take, from the first one on; all where it is not given.
        seed: Seed from which everything random about a prompt is drawn.
        cache: Folder that remote shards are kept in, as for `fit`.
    """

    READER: ClassVar[type[ShardReader]] = ShardReader
    """Reads a sample."""

    def __init__(
        self,
        shards: str | list[str],
        group_size: int = 16,
        count: int | None = None,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__(group_size, seed)
        check_number("count", count, 1)
        self.shards, self.count, self.cache = shards, count, cache

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes."""
        found = find_shards(self.shards)
        self.reader = self.READER(found, cache=ShardCache(self.cache)).check()
        self.plan = Plan(self.reader.counts, shuffle=False)

    @property
    def total_prompts(self) -> int:
        """Number of pairs that are taken."""
        return min(self.plan.samples, self.count or self.plan.samples)

    def fingerprint(self) -> str:
        """Return a short text that two lists share only if they have the same shards."""
        return self.reader.fingerprint(self.total_prompts)

    def place(self, index: int) -> tuple[int, int]:
        """Return the numbers of the shard and of the sample in it, at a place of the list."""
        [place] = self.plan.slice(0, index, index + 1)
        return place

    def stored(self, index: int) -> Any:
        """Return the whole sample at a place of the list."""
        return self.reader(*self.place(index))

    def read(self, index: int) -> Any:
        """Return the prompt and the chosen image of a pair."""
        sample = self.stored(index)
        open_image(sample.sides[0])  # its header is enough to tell
        return prompt_of(sample), sample.sides[0]


class ShardGroups(PairGroups):
    """Deals out whole samples of shards, to make something else of each."""

    def read(self, index: int) -> Any:
        """Return a sample that has a prompt."""
        sample = self.stored(index)
        prompt_of(sample)
        return sample

    def group(self, number: int) -> StoredGroup:
        """Return one group, without what cannot be read."""
        places = self.places(number)
        found = self.readable(places)
        shards = [self.place(index)[0] for index in found]
        samples = list(found.values())
        return StoredGroup(number, places, list(found), shards, samples, self.seeds(found))


class SampleGroups(ShardGroups):
    """Pairs of images out of shards, to make something else of each.

    Args:
        shards: Folder or URL of pair shards, or a list of them, as `fit` takes them.
        group_size: Pairs that are worked on together, whole or not at all.
        count: How many of the pairs to take, from the first one on; all where it is not given.
        seed: Seed from which everything random about a pair is drawn.
        cache: Folder that remote shards are kept in, as for `fit`.
    """


class CachedGroups(ShardGroups):
    """Samples of cached shards, to compute something of each.

    Args:
        shards: Folder or URL of cached shards, or a list of them, as `fit` takes them.
        group_size: Pairs that are worked on together, whole or not at all.
        count: How many of the pairs to take, from the first one on; all where it is not given.
        seed: Seed from which everything random about a pair is drawn.
        cache: Folder that remote shards are kept in, as for `fit`.
    """

    READER: ClassVar[type[ShardReader]] = LatentReader

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes, and what is told of the latents."""
        super().setup(stage)
        self.latents = LatentSet.from_shards(self.reader.shards)

    def settings(self) -> dict[str, str | int]:
        """Return what decides which pairs are worked on together, and what they hold."""
        return {**super().settings(), "latents": self.latents.identity}

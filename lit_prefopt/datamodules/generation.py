"""Data modules of `predict`: prompts or stored pairs in fixed, atomic groups."""

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
from lit_prefopt.data.loading.image_samples import label_of, prompt_of
from lit_prefopt.data.order.plan import Plan
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.remote_cache import ShardCache
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.prompts.base import Prompts
from lit_prefopt.utils.seeds import stable_seed

log = logging.getLogger(__name__)


class GenerationGroup(NamedTuple):
    """Prompts of one generation batch; a result may depend on the other prompts of its group."""

    number: int  # number of the group in the list of groups
    indices: list[int]  # indices of its B prompts in the list of prompts
    texts: list[str]  # B prompts
    seeds: Tensor  # (B,) int64: all random numbers of a prompt are drawn from its seed
    images: list[bytes | None]  # B encoded images, where the prompts have one


class StoredGroup(NamedTuple):
    """Stored samples that are processed together."""

    number: int  # number of the group in the list of groups
    places: range  # indices of all its samples in the list of samples, broken ones included
    indices: list[int]  # indices of the B samples that can be read
    shards: list[int]  # numbers of their shards
    samples: list[Any]  # B samples, as their reader returns them
    seeds: Tensor  # (B,) int64


class GenerationDataModule(LightningDataModule):
    """Distributes groups over the ranks; the groups do not depend on the number of ranks.

    Args:
        group_size: Prompts or pairs of a group, which is generated whole or not at all.
        seed: Seed of all random numbers: each prompt or pair has a seed of its own drawn from it.
    """

    def __init__(self, *, group_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        check_number("group_size", group_size, 1)
        self.group_size, self.seed = group_size, seed

    @property
    @abstractmethod
    def total_prompts(self) -> int:
        """Number of prompts."""

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return the entry at an index of the list: the prompt and, if it has one, its image.

        Raises:
            BrokenSample: The entry cannot be used, and is left out.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the list of prompts."""

    def settings(self) -> dict[str, str | int]:
        """Return the settings that determine groups and seeds."""
        return {"prompts": self.fingerprint(), "group_size": self.group_size, "seed": self.seed}

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-self.total_prompts // self.group_size)

    def group(self, number: int) -> Any:
        """Return one group, without unreadable entries; by default a `GenerationGroup`."""
        found = self.readable(self.places(number))
        texts, images = [text for text, _ in found.values()], [i for _, i in found.values()]
        return GenerationGroup(number, list(found), texts, self.seeds(found), images)

    def places(self, number: int) -> range:
        """Return the indices of a group's members in the list."""
        first = number * self.group_size
        return range(first, min(first + self.group_size, self.total_prompts))

    def readable(self, places: Iterable[int]) -> dict[int, Any]:
        """Return entries of the list by index, without unreadable ones."""
        found: dict[int, Any] = {}
        for index in places:
            try:
                found[index] = self.read(index)
            except BrokenSample as error:
                log.warning("A sample cannot be read and is left out: %s.", error)
        return found

    def seeds(self, places: Iterable[int]) -> Tensor:
        """Return the seeds of some indices of the list, (B,) int64."""
        seeds = [stable_seed("generate", self.seed, index) for index in places]
        return torch.tensor(seeds, dtype=torch.int64)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """Return the group unchanged: Lightning would visit every byte of its images."""
        return batch

    def predict_dataloader(self) -> _RankGroups:
        """Return the groups of this rank."""
        return _RankGroups(self)


class _RankGroups:
    """Groups of a rank; not a DataLoader, so that Lightning adds no distributed sampler."""

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
    """Prompts to generate images for.

    Args:
        prompts: Source of the prompts; one that occurs twice is generated twice.
    """

    def __init__(self, prompts: Prompts, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompts = prompts

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts."""
        self.entries = self.prompts.entries()
        self.texts = [entry.text for entry in self.entries]
        if not self.texts:
            raise InputError("There are no prompts to generate: name others as `--data.prompts`.")

    @property
    def total_prompts(self) -> int:
        """Number of prompts."""
        return len(self.texts)

    def fingerprint(self) -> str:
        """Return a hash of the list of prompts."""
        return blake2s(json.dumps(self.texts).encode(), digest_size=8).hexdigest()

    def read(self, index: int) -> tuple[str, bytes | None]:
        """Return the prompt at an index of the list, without an image."""
        return self.texts[index], None


class PairGroups(GenerationDataModule):
    """Prompts of pair shards, each with its chosen image.

    Args:
        shards: Folder or URL of pair shards (or of cached shards), or a list of them, as in `fit`.
        count: Number of pairs to use, from the first one on; all if not given.
        cache: Folder of downloaded shards, as in `fit`.
    """

    READER: ClassVar[type[ShardReader]] = ShardReader
    """Reader of a sample."""

    def __init__(
        self,
        shards: str | list[str],
        *,
        count: int | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("count", count, 1, optional=True)
        self.shards, self.count, self.cache = shards, count, cache

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes."""
        found = find_shards(self.shards)
        self.reader = self.READER(found, cache=ShardCache(self.cache)).check()
        self.plan = Plan(self.reader.counts, shuffle=False)

    @property
    def total_prompts(self) -> int:
        """Number of pairs that are used."""
        return min(self.plan.samples, self.count or self.plan.samples)

    def fingerprint(self) -> str:
        """Return a hash of the shards and the number of pairs."""
        return self.reader.fingerprint(self.total_prompts)

    def place(self, index: int) -> tuple[int, int]:
        """Return the shard's number and the sample's number in it, of an index of the list."""
        [place] = self.plan.slice(0, index, index + 1)
        return place

    def stored(self, index: int) -> Any:
        """Return the complete sample at an index of the list."""
        return self.reader(*self.place(index))

    def read(self, index: int) -> Any:
        """Return the prompt and the chosen image of a pair; a disliked single image is none."""
        sample = self.stored(index)
        open_image(sample.sides[0])  # the header is enough to check it
        liked = sample.side_count > 1 or label_of(sample) == 1
        return prompt_of(sample), sample.sides[0] if liked else None


class ShardGroups(PairGroups):
    """Complete samples of shards, to convert each."""

    def read(self, index: int) -> Any:
        """Return a sample that has a prompt."""
        sample = self.stored(index)
        prompt_of(sample)
        return sample

    def group(self, number: int) -> StoredGroup:
        """Return one group, without unreadable samples."""
        places = self.places(number)
        found = self.readable(places)
        shards = [self.place(index)[0] for index in found]
        samples = list(found.values())
        return StoredGroup(number, places, list(found), shards, samples, self.seeds(found))


class SampleGroups(ShardGroups):
    """Pairs of images from shards, to encode or corrupt each."""


class CachedGroups(ShardGroups):
    """Samples of cached shards, to compute the reference's errors of each."""

    READER: ClassVar[type[ShardReader]] = LatentReader

    reader: LatentReader

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and the manifest of the latents."""
        super().setup(stage)
        self.latents = LatentSet.from_shards(self.reader.shards)

    def settings(self) -> dict[str, str | int]:
        """Return the settings that determine groups, seeds and latents."""
        return {**super().settings(), "latents": self.latents.identity}

"""Store of what training encodes: latents by the bytes of the images, prompts by their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.conditioning import VALUES, Prompt, Text
from lit_prefopt.data.loading.image_samples import (
    ImageSample,
    ImageSampleLoader,
    PreparedSample,
    SampleRef,
    collate,
    label_of,
    weight_of,
)
from lit_prefopt.data.loading.side_numbers import SideNumbers, collate_numbers
from lit_prefopt.ragged import Ragged
from lit_prefopt.utils.record_store import RecordStore

LATENTS, PROMPTS = "latents", "prompts"  # kinds of records


class EncodingStore(RecordStore):
    """Latents and embedded prompts of one model at one batch size, each stored once.

    The key of latents is a hash of the images' bytes, the crop and the mask, and that of a prompt
    one of its text. So nothing needs to be known of shards: renamed, split or mixed ones find the
    same records, and a changed image has none.

    Args:
        folder: Folder of the model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

    def latents(self, name: str) -> dict[str, Tensor] | None:
        """Return mean, deviation and perhaps masks of a pair; None if they are not stored.

        Args:
            name: Name of its record.
        """
        return self.read(LATENTS, name)

    def prompt(self, text: str) -> dict[str, Tensor] | None:
        """Return the text tensors of a prompt, `NAME.values` for a ragged one; None if unknown."""
        return self.read(PROMPTS, text_key(text))


def text_key(text: str) -> str:
    """Return the name of a prompt's record."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def latents_key(sample: PreparedSample, sides: int, *, mirrored: bool = False) -> str:
    """Return the name of the record of a sample's latents.

    Args:
        sample: The sample with its crop.
        sides: Number of sides that are encoded at most, the best ones first.
        mirrored: Return the name for the mirrored images.
    """
    stored, augment, crop = sample.stored, sample.augment, sample.crop
    crop = crop._replace(flip=crop.flip != mirrored)
    digest = blake2b(digest_size=16)
    images = stored.sides[:sides]
    how = (augment.size, augment.draft, tuple(crop), sample.headers[0].size, len(images))
    digest.update(repr(how).encode())
    for data in (*images, stored.mask or b""):
        digest.update(f"/{len(data)}/".encode())
        digest.update(data)
    return digest.hexdigest()


def prompt_record(prompt: Prompt, row: int) -> dict[str, Tensor]:
    """Return the tensors of a prompt's record.

    Args:
        prompt: Embedded prompts.
        row: Number of the one to store.
    """
    ragged = {name for name, value in prompt.text.items() if isinstance(value, Ragged)}
    tensors = prompt.row(row)
    return {name + VALUES if name in ragged else name: x for name, x in tensors.items()}


def prompt_from_records(rows: Sequence[Mapping[str, Tensor]]) -> Prompt:
    """Return the prompts of some records: the inverse of `prompt_record`."""
    text: dict[str, Text] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.endswith(VALUES):
            text[name.removesuffix(VALUES)] = Ragged.from_rows(values)
        else:
            text[name] = torch.stack(values)
    return Prompt(text)


class EncodedSample(NamedTuple):
    """Sample of a batch: with its encodings, as far as they are stored, or with its images."""

    prepared: PreparedSample
    label: float
    weight: float
    record: str  # name of its latents' record; "" if it has none
    latents: dict[str, Tensor] | None
    prompt: dict[str, Tensor] | None
    image: ImageSample | None  # where latents or prompt are not stored

    @property
    def known(self) -> SideNumbers:
        """What is known of each side beside its image."""
        stored = self.prepared.stored
        return SideNumbers.from_meta(stored.meta, stored.side_count)


class StoredEncodingLoader:
    """Load latents and prompts that are stored, and images for the batches that lack some.

    A batch comes from the store as a whole or not at all: in a smaller batch, networks round other
    digits. So a training gets the latents that it had without a store, to the last bit.

    Args:
        images: Loader of the same samples as images.
        store: Where encodings are stored.
        keep_latents: Whether latents are stored, or only prompts.
        sides: Number of sides that are encoded at most, the best ones first.
    """

    def __init__(
        self, images: ImageSampleLoader, store: EncodingStore, *, keep_latents: bool, sides: int
    ) -> None:
        self.images, self.store = images, store
        self.keep_latents, self.sides = keep_latents, sides
        self.reader = images.reader

    def load(self, ref: SampleRef) -> EncodedSample:
        """Return a sample with its encodings, or with its images where it lacks some."""
        prepared = self.images.prepare(ref)
        record, latents = "", None
        if self.keep_latents:
            record = latents_key(prepared, self.sides)
            latents = self.store.latents(record)
        prompt = self.store.prompt(prepared.text)
        lacking = latents is None or prompt is None
        image = prepared.decode() if lacking else None
        label, weight = label_of(prepared.stored), weight_of(prepared.stored)
        return EncodedSample(prepared, label, weight, record, latents, prompt, image)

    def collate(
        self, samples: list[EncodedSample], broken: tuple[str, ...] = ()
    ) -> ImagePairs | LatentPairs:
        """Return the batch of some samples; for the arguments see `SampleLoader`."""
        records = [sample.record for sample in samples]
        prompts = [sample.prompt for sample in samples if sample.prompt is not None]
        prompt = prompt_from_records(prompts) if len(prompts) == len(samples) else None
        latents = [sample.latents for sample in samples if sample.latents is not None]
        if prompt is None or len(latents) < len(samples):
            images = [sample.image or sample.prepared.decode() for sample in samples]
            batch = collate(images, broken)
            return batch._replace(
                prompt=prompt,
                records=records,
                mirrored=self._mirrored(samples),
                captions=[sample.prepared.stored.text for sample in samples],
            )
        scores, noise_seeds = collate_numbers([sample.known for sample in samples])
        mean = torch.stack([one["mean"] for one in latents])
        masks = None
        if any("masks" in one for one in latents):  # others may differ everywhere
            ones = torch.ones(1, *mean.shape[-2:])
            masks = torch.stack([one.get("masks", ones) for one in latents])
        return LatentPairs(
            mean=mean,
            deviation=torch.stack([one["deviation"] for one in latents]),
            prompt=prompt,
            texts=[sample.prepared.text for sample in samples],
            seeds=torch.tensor([sample.prepared.seed for sample in samples]),
            labels=torch.tensor([sample.label for sample in samples]),
            weights=torch.tensor([sample.weight for sample in samples]),
            keys=[sample.prepared.stored.name for sample in samples],
            masks=masks,
            broken=broken,
            frames=torch.tensor([sample.prepared.frames for sample in samples]),
            records=records,
            scores=scores,
            noise_seeds=noise_seeds,
        )

    def _mirrored(self, samples: list[EncodedSample]) -> list[str] | None:
        """Return the names of the mirrored images' records, if later epochs may show them."""
        flips = any(sample.prepared.augment.flip for sample in samples)
        if not flips or not self.keep_latents or self.images.fixed is not None:
            return None
        return [latents_key(s.prepared, self.sides, mirrored=True) for s in samples]

"""Encode batches of images, and store what is new of them within a bound."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.data.latents.encoding_store import (
    LATENTS,
    PROMPTS,
    EncodingStore,
    prompt_record,
    text_key,
)
from lit_prefopt.diffusion.encoding import encode_posteriors
from lit_prefopt.fit_caches.identity import hash_of
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.record_store import remove_oldest, size_of

SETTINGS = "settings.json"
FOLDER = "encodings"  # in the folder of `data.cache`


class StoreBounds(NamedTuple):
    """What a store may take, and what it is expected to hold."""

    limit: int  # bytes of the stores of all models together
    latents: int  # records of latents in the end
    prompts: int  # records of prompts at most
    rank: int  # of this process on its machine
    ranks: int  # on this machine


class EncodingCache:
    """Encodes batches, and writes the rows that the store lacks.

    A batch on a GPU is copied to pinned memory without waiting, and written when the next one is
    encoded.

    Args:
        backbone: The backbone that encodes.
        root: Folder of the stores of all models.
        settings: All that determines the encodings, by name.
        bounds: What the store may take.
    """

    def __init__(
        self, backbone: Backbone, root: Path, settings: dict[str, Any], bounds: StoreBounds
    ) -> None:
        self.backbone, self.settings, self.bounds = backbone, settings, bounds
        self.store = EncodingStore(root / hash_of(settings))
        self.left: int | None = None  # bytes that this process may still write
        self.writes = True
        self._waiting: list[LatentPairs] = []
        self._copied: torch.cuda.Event | None = None

    def encode(self, batch: ImagePairs, *, keep: bool = True) -> LatentPairs:
        """Encode a batch of images, and store what is new of it.

        Images that are flipped at random are encoded mirrored as well, and captions that were
        dropped are embedded: a later batch needs all of its rows, whichever way each is shown.

        Args:
            batch: B pairs of images with the names of their records.
            keep: Whether to store it.
        """
        self.flush()
        encoded = encode_posteriors(self.backbone, batch)
        if keep and self.writes:
            self._waiting = [self._on_host(encoded)]
            if any((LATENTS, name) not in self.store for name in batch.mirrored or []):
                mirrored = _mirrored(batch)._replace(prompt=encoded.prompt)
                self._waiting.append(self._on_host(encode_posteriors(self.backbone, mirrored)))
            captions = batch.captions or []
            if any((PROMPTS, text_key(text)) not in self.store for text in captions):
                self._add_captions(encoded, captions)
            if self._copied is None:  # nothing to wait for
                self.flush()
        return encoded

    def _add_captions(self, encoded: LatentPairs, captions: list[str]) -> None:
        """Embed the captions of a batch in which some were dropped, as a batch of its size."""
        if captions == encoded.texts:
            return
        with torch.no_grad():
            prompt = self.backbone.embed(captions)
        none = encoded._replace(mean=encoded.mean[:, :0], deviation=None, masks=None)
        nameless = none._replace(prompt=prompt, texts=captions, records=[""] * len(captions))
        self._waiting.append(self._on_host(nameless))

    def flush(self) -> None:
        """Write the batch that was encoded last."""
        waiting, self._waiting = self._waiting, []
        if not waiting or not self.writes:
            return
        if self._copied is not None:
            self._copied.synchronize()
        try:
            for record in chain.from_iterable(map(_records, waiting)):
                if record.name not in self.store and not self._write(record):
                    return
        except OSError as error:
            self._stop(f"{self.store.folder} cannot be written ({error})")

    def touch(self) -> None:
        """Mark the store as used: the least recently used ones are removed first."""
        with suppress(OSError):  # nothing is stored yet, or it belongs to another user
            os.utime(self.store.folder)

    def _write(self, record: _Record) -> bool:
        if self.left is None:
            self.left = self._reserve(record)
        if not self.writes:
            return False
        size = sum(x.nbytes for x in record.tensors.values())
        if size > self.left:
            self._stop("The bound of `data.cache_size` is reached")
            return False
        self.left -= self.store.write(*record.name, record.tensors)
        return True

    def _reserve(self, record: _Record) -> int:
        """Return the bytes that this process may write, and remove stores that are in the way."""
        bounds, store = self.bounds, self.store.folder
        store.mkdir(parents=True, exist_ok=True)
        write_atomic(store / SETTINGS, json.dumps(self.settings, indent=1, default=str))
        others = [one for one in store.parent.iterdir() if one.is_dir() and one != store]
        taken, own = sum(map(size_of, others)), size_of(store)
        needed = _needed(record, bounds)
        if needed <= bounds.limit and not bounds.rank:
            taken -= remove_oldest(others, taken + max(needed, own) - bounds.limit)
        left = min(bounds.limit - taken - own, shutil.disk_usage(store).free // 2)
        what = "Latents and prompts" if bounds.latents else "Prompts"
        if needed - own > left:
            self._stop(
                f"{what} of this run would take {size_in_words(needed)} at most, more than the "
                f"{size_in_words(left + own)} that `data.cache_size` and half of the free disk "
                "leave"
            )
            return 0
        rank_zero_info(
            f"{what} are kept in {store}, {size_in_words(needed)} at most, and read from the next "
            "visit of a pair on (`--data.keep_encodings false` turns this off)."
        )
        return left // bounds.ranks

    def _stop(self, reason: str) -> None:
        self.writes = False
        rank_zero_warn(
            f"{reason}: no further encodings are kept in {self.store.folder}, and their pairs are "
            "encoded at every visit; raise `--data.cache_size`, or choose another disk with "
            "`--data.cache`."
        )

    def _on_host(self, encoded: LatentPairs) -> LatentPairs:
        """Return the tensors to store on the CPU; from a GPU they are copied without waiting."""
        moved = encoded._replace(
            mean=_host(encoded.mean),
            deviation=None if encoded.deviation is None else _host(encoded.deviation),
            masks=None if encoded.masks is None else _host(encoded.masks),
            prompt=Prompt(encoded.prompt.text).map(_host),
        )
        if encoded.mean.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return moved


class _Record(NamedTuple):
    """A record that may be written."""

    name: tuple[str, str]  # kind and key
    latents: dict[str, Tensor]
    prompt: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its kind."""
        return self.latents if self.name[0] == LATENTS else self.prompt


def _records(encoded: LatentPairs) -> list[_Record]:
    """Return the records of the rows of a batch."""
    found = []
    for row, (name, text) in enumerate(zip(encoded.records or [], encoded.texts, strict=True)):
        prompt = prompt_record(encoded.prompt, row)
        latents: dict[str, Tensor] = {}
        if name:
            latents["mean"] = encoded.mean[row]
            if encoded.deviation is not None:
                latents["deviation"] = encoded.deviation[row]
            if encoded.masks is not None:
                latents["masks"] = encoded.masks[row]
            found.append(_Record((LATENTS, name), latents, prompt))
        found.append(_Record((PROMPTS, text_key(text)), latents, prompt))
    return found


def stored_bytes(encoded: LatentPairs, bounds: StoreBounds) -> int:
    """Return the bytes that the encodings of a run take at most, by those of a batch's first pair.

    Args:
        encoded: An encoded batch; fake tensors suffice.
        bounds: What the store is expected to hold.
    """
    [record, *_] = _records(encoded._replace(records=["first"] * len(encoded.texts)))
    return _needed(record, bounds)


def _needed(record: _Record, bounds: StoreBounds) -> int:
    prompt = sum(x.nbytes for x in record.prompt.values())
    latents = sum(x.nbytes for x in record.latents.values())
    return bounds.latents * latents + bounds.prompts * prompt


def _mirrored(batch: ImagePairs) -> ImagePairs:
    """Return a batch with its images and masks mirrored."""
    masks = None if batch.masks is None else batch.masks.flip(-1)
    images = batch.scaled().images.flip(-1)
    return batch._replace(images=images, masks=masks, records=batch.mirrored)


def _host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


def size_in_words(size: int) -> str:
    """Return a size in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

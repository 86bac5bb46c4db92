"""Cached samples on their way into a batch: which view of a pair, and with which prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.batches import LatentPairs, Prompt
from lit_prefopt.data.images import AugmentDraws, BrokenSample
from lit_prefopt.data.latents.error_table import ErrorTable, draw_seed
from lit_prefopt.data.latents.latent_reader import LatentReader, LatentSample
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.loading.image_samples import (
    GiveRoom,
    Visit,
    label_of,
    own_room,
    prompt_of,
    weight_of,
)
from lit_prefopt.utils.seeds import sample_seed


class LoadedLatents(NamedTuple):
    """One sample of a batch."""

    tensors: dict[str, Tensor]  # of one view, without the prompt
    hidden: Tensor  # (N, D)
    pooled: Tensor | None  # (P,)
    text: str
    seed: int
    label: float
    weight: float
    key: str
    errors: Tensor | None = None  # (E, K): the reference's


class LatentSampleLoader:
    """Cached samples, of which the coins of a visit choose a view.

    The coin that would have mirrored an image chooses the view, so that of a middle crop that is
    kept plain and mirrored the same one is chosen as from images, by the same seed.

    Args:
        reader: Reads a sample by (shard number, sample number).
        seed: Seed of the run.
        latents: What holds of all samples.
        caption_dropout: Share of the visits whose prompt is left empty.
        held_out: Take the first view always, and leave no prompt empty.
    """

    def __init__(
        self,
        reader: LatentReader,
        seed: int,
        latents: LatentSet,
        caption_dropout: float = 0.0,
        held_out: bool = False,
    ) -> None:
        self.reader, self.seed, self.latents = reader, seed, latents
        self.caption_dropout, self.held_out = caption_dropout, held_out

    def item(self, visit: Visit) -> LoadedLatents:
        """Return a sample as its seed says."""
        stored = self.reader(visit.shard, visit.sample)
        return self.make(stored, sample_seed(self.seed, visit.epoch, visit.position))

    def make(self, stored: LatentSample, seed: int) -> LoadedLatents:
        """Return a stored sample as a seed says; raise BrokenSample if it cannot be used."""
        text = prompt_of(stored)
        try:
            tensors = self.latents.check(stored).tensors
        except BrokenSample as error:
            raise BrokenSample(f"{stored.name} {error}") from error
        drawn, views = AugmentDraws.from_seed(seed), len(tensors["mean"])
        # the mirrored views are the later ones, and images are mirrored by the smaller half
        view = 0 if self.held_out else views - 1 - int(drawn.flip * views)
        dropped = not self.held_out and drawn.drop < self.caption_dropout
        hidden, pooled = tensors["hidden"], tensors.get("pooled")
        if dropped:
            empty = self.latents.empty
            hidden, pooled = empty.hidden[0], None if empty.pooled is None else empty.pooled[0]
        return LoadedLatents(
            {k: v[view] for k, v in tensors.items() if k not in ("hidden", "pooled")},
            hidden,
            pooled,
            "" if dropped else text,
            seed,
            label_of(stored),
            weight_of(stored),
            stored.name,
        )

    def collate(
        self, items: list[LoadedLatents], broken: tuple[str, ...] = (), room: GiveRoom = own_room
    ) -> LatentPairs:
        """Return the batch that these items make; for the arguments see `Items`."""
        means = _stacked([item.tensors["mean"] for item in items], room)
        pooled = [item.pooled for item in items if item.pooled is not None]
        errors = [item.errors for item in items if item.errors is not None]
        masks = None
        if any("masks" in item.tensors for item in items):  # where there is none, all may differ
            ones = torch.ones(1, *means.shape[-2:])
            masks = torch.stack([item.tensors.get("masks", ones) for item in items])
        return LatentPairs(
            mean=means,
            deviation=_stacked([item.tensors["deviation"] for item in items], room)
            if self.latents.settings["deviation"]
            else None,
            prompt=Prompt(
                _stacked([item.hidden for item in items], room),
                torch.stack(pooled) if pooled else None,
            ),
            texts=[item.text for item in items],
            seeds=torch.tensor([item.seed for item in items]),
            labels=torch.tensor([item.label for item in items]),
            weights=torch.tensor([item.weight for item in items]),
            keys=[item.key for item in items],
            masks=masks,
            broken=broken,
            frames=torch.stack([item.tensors["frames"] for item in items]),
            reference_error=torch.stack(errors) if errors else None,
        )


def _stacked(tensors: list[Tensor], room: GiveRoom) -> Tensor:
    """Return all in one, every byte copied once."""
    first = tensors[0]
    whole = torch.from_numpy(room(len(tensors) * first.nbytes)).view(first.dtype)
    return torch.stack(tensors, out=whole.view(len(tensors), *first.shape))


class FixedDrawSampleLoader(LatentSampleLoader):
    """Cached samples whose draws are fixed, each with the reference's errors at it.

    The n-th epoch uses the draw n modulo their number; held-out samples have the errors of all.

    Args:
        reader: Reads a sample by (shard number, sample number).
        table: The reference's errors, and from which seeds they were drawn.
        latents: What holds of all samples.
        caption_dropout: Share of the visits whose prompt is left empty.
        held_out: Take the first view always, and leave no prompt empty.
    """

    def __init__(
        self,
        reader: LatentReader,
        table: ErrorTable,
        latents: LatentSet,
        caption_dropout: float = 0.0,
        held_out: bool = False,
    ) -> None:
        super().__init__(reader, table.seed, latents, caption_dropout, held_out)
        self.table = table
        self.starts = [sum(reader.counts[:shard]) for shard in range(len(reader.counts))]

    def item(self, visit: Visit) -> LoadedLatents:
        """Return a sample at the draw of the visit's epoch."""
        index = self.starts[visit.shard] + visit.sample
        draw = 0 if self.held_out else visit.epoch % self.table.draws
        stored = self.reader(visit.shard, visit.sample)
        item = self.make(stored, draw_seed(self.table.seed, index, draw))
        errors = self.table.errors(index, stored.name)
        return item._replace(errors=errors if self.held_out else errors[draw : draw + 1])

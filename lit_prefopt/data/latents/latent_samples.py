"""Load cached samples: choose a view and a prompt, and collate samples into a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.batches import LatentPairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.data.images import AugmentDraws, BrokenSample
from lit_prefopt.data.latents.error_table import ErrorTable, draw_seed
from lit_prefopt.data.latents.latent_reader import LatentReader, LatentSample
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.loading.image_samples import SampleRef, label_of, prompt_of, weight_of
from lit_prefopt.data.loading.side_numbers import SideNumbers, collate_numbers
from lit_prefopt.utils.seeds import sample_seed


class CachedSample(NamedTuple):
    """Cached sample of a batch: one view with its prompt."""

    tensors: dict[str, Tensor]  # of one view, without the prompt
    prompt: dict[str, Tensor]  # text tensors by name, one row
    text: str
    seed: int
    label: float
    weight: float
    key: str
    known: SideNumbers
    errors: Tensor | None = None  # (E, K), of the reference


class LatentSampleLoader:
    """Load cached samples; the draws of a sample's seed choose the view.

    The draw that would flip an image chooses the view, so that with a middle crop stored plain and
    mirrored the same view is chosen as from images with the same seed.

    Args:
        reader: Reads a sample by (shard number, sample number).
        seed: Seed of the run.
        latents: What holds of all samples.
        caption_dropout: Share of the samples whose prompt is left empty.
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

    def load(self, ref: SampleRef) -> CachedSample:
        """Load the view of a sample that its seed chooses."""
        stored = self.reader(ref.shard, ref.sample)
        return self.view(stored, sample_seed(self.seed, ref.epoch, ref.position))

    def view(self, stored: LatentSample, seed: int) -> CachedSample:
        """Choose a view by a seed; raise BrokenSample if the sample is broken."""
        text = prompt_of(stored)
        try:
            self.latents.check(stored)
        except BrokenSample as error:
            raise BrokenSample(f"{stored.name} {error}") from error
        drawn, views = AugmentDraws.from_seed(seed), len(stored.tensors["mean"])
        # the mirrored views are last, and images are flipped for draws in the lower half
        view = 0 if self.held_out else views - 1 - int(drawn.flip * views)
        dropped = not self.held_out and drawn.drop < self.caption_dropout
        return CachedSample(
            {name: x[view] for name, x in stored.views.items()},
            self.latents.empty.row(0) if dropped else stored.prompt,
            "" if dropped else text,
            seed,
            label_of(stored),
            weight_of(stored),
            stored.name,
            SideNumbers.from_meta(stored.meta, stored.side_count),
        )

    def collate(self, samples: list[CachedSample], broken: tuple[str, ...] = ()) -> LatentPairs:
        """Collate samples into a batch; for the arguments see `SampleLoader`."""
        means = torch.stack([sample.tensors["mean"] for sample in samples])
        scores, noise_seeds = collate_numbers([sample.known for sample in samples])
        errors = [sample.errors for sample in samples if sample.errors is not None]
        masks = None
        if any("masks" in sample.tensors for sample in samples):  # others may differ everywhere
            ones = torch.ones(1, *means.shape[-2:])
            masks = torch.stack([sample.tensors.get("masks", ones) for sample in samples])
        return LatentPairs(
            mean=means,
            deviation=torch.stack([sample.tensors["deviation"] for sample in samples])
            if self.latents.settings["deviation"]
            else None,
            prompt=Prompt.from_rows([sample.prompt for sample in samples], self.latents.empty),
            texts=[sample.text for sample in samples],
            seeds=torch.tensor([sample.seed for sample in samples]),
            labels=torch.tensor([sample.label for sample in samples]),
            weights=torch.tensor([sample.weight for sample in samples]),
            keys=[sample.key for sample in samples],
            masks=masks,
            broken=broken,
            frames=torch.stack([sample.tensors["frames"] for sample in samples]),
            reference_error=torch.stack(errors) if errors else None,
            scores=scores,
            noise_seeds=noise_seeds,
        )


class FixedDrawLoader(LatentSampleLoader):
    """Load cached samples at fixed draws, with the reference's errors at each.

    The n-th epoch uses the draw n modulo their number; held-out samples have the errors of all.

    Args:
        reader: Reads a sample by (shard number, sample number).
        table: The reference's errors with the seeds of their draws.
        latents: What holds of all samples.
    """

    def __init__(
        self, reader: LatentReader, table: ErrorTable, latents: LatentSet, **options: Any
    ) -> None:
        super().__init__(reader, table.seed, latents, **options)
        self.table = table
        self.starts = [sum(reader.counts[:shard]) for shard in range(len(reader.counts))]

    def load(self, ref: SampleRef) -> CachedSample:
        """Load a sample at the draw of its epoch."""
        index = self.starts[ref.shard] + ref.sample
        draw = 0 if self.held_out else ref.epoch % self.table.draws
        stored = self.reader(ref.shard, ref.sample)
        sample = self.view(stored, draw_seed(self.table.seed, index, draw))
        errors = self.table.errors(index, stored.name)
        if self.reader.pairs_only and errors.shape[1] > 2:
            errors = errors[:, [0, -1]]
        return sample._replace(errors=errors if self.held_out else errors[draw : draw + 1])

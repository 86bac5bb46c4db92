"""Precompute the reference's denoising errors at a few fixed draws of every pair."""

from __future__ import annotations

import importlib.metadata
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.cache_checks import check_latents, settings_of_reference
from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.latents.error_table import draw_seed
from lit_prefopt.data.latents.latent_reader import LatentSample
from lit_prefopt.data.latents.latent_samples import LatentSampleLoader
from lit_prefopt.data.shards.format import SIDES
from lit_prefopt.data.shards.sides import described, side_counts
from lit_prefopt.datamodules.generation import CachedGroups, GenerationDataModule, StoredGroup
from lit_prefopt.diffusion import draws as drawing
from lit_prefopt.diffusion.denoising import discounted, noise_pairs, predict_errors
from lit_prefopt.diffusion.encoding import draw_latents
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.generate.output_formats import OutputFormat, TableFormat
from lit_prefopt.generate.producer import Producer


class ReferenceErrors(Producer):
    """Computes the denoising errors of the reference at fixed draws, for `CachedPairs`.

    A draw contains everything random about a training sample: noise level, noise, view, caption
    dropout and the VAE's posterior sample. Training with the table does not evaluate the
    reference, and a full fine-tune with `--backbone.reference none` has no second network. The
    table takes 8 bytes for the errors and 4 for the noise level of each draw of a pair; of a ranked
    list it has an error for each image.

    Use the backbone and trainer settings of the training, which refuses errors of another network,
    noise schedule, precision or attention. The last digits also depend on the batch size.

    Args:
        backbone: The model whose reference is evaluated, or the initial policy with
            `--backbone.reference none`; given as the recipe's own key `backbone`.
        output: Output folder of the table.
        draws: Draws per pair; for held-out pairs the method's `validation_draws`.
        caption_dropout: Share of the draws with an empty prompt, as in training.
        held_out: Draw as in validation: the first view, without caption dropout.
        gamma: The method's `gamma`, if it has one; 1 leaves the draw to the noise process.
        gamma_steps: See `gamma`.
        masked: Compute errors only inside a pair's mask, as the method does.
        mask_dilation: The method's `mask_dilation`, if it has one.
        batch_size: Pairs per forward, best as many as in training.
    """

    WANTS: ClassVar[type[GenerationDataModule]] = CachedGroups
    WANTED: ClassVar[str] = "CachedGroups"

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        draws: int,
        caption_dropout: float = 0.0,
        held_out: bool = False,
        gamma: float = 1.0,
        gamma_steps: int = 50,
        masked: bool = False,
        mask_dilation: int = 0,
        batch_size: int = 8,
    ) -> None:
        super().__init__(backbone, output)
        backbone.require_denoiser(type(self).__name__)
        check_number("draws", draws, 1)
        check_number("caption_dropout", caption_dropout, 0, 1)
        check_number("gamma", gamma, most=1, above=0)
        check_number("gamma_steps", gamma_steps, 1)
        check_number("batch_size", batch_size, 1)
        check_number("mask_dilation", mask_dilation, 0)
        backbone.requires_grad_(False)  # not frozen, to keep training's precision
        self.draws, self.caption_dropout, self.held_out = draws, caption_dropout, held_out
        self.gamma, self.gamma_steps = gamma, gamma_steps
        self.masked, self.mask_dilation = masked, mask_dilation
        self.batch_size = batch_size

    @property
    def form(self) -> OutputFormat:
        """Format of the output folder."""
        return TableFormat()

    def model_settings(self) -> dict[str, Any]:
        """Return the settings that determine the reference's errors at a draw."""
        return settings_of_reference(self)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the draws."""
        names = ("draws", "caption_dropout", "held_out", "gamma", "gamma_steps", "batch_size")
        return {name: getattr(self, name) for name in names}

    def notes(self) -> dict[str, Any]:
        """Return notes on the origin of the output."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        device = self.trainer.strategy.root_device.type
        return {"checkpoint": self.backbone.checkpoint, "device": device, **versions}

    def setup(self, stage: str | None = None) -> None:
        """Check an existing output before computing."""
        data = self.groups()
        assert isinstance(data, CachedGroups)
        check_latents(self.backbone, data.latents)
        reader, self.seed = data.reader, data.seed
        counts = side_counts(reader.shards)
        if len(counts) > 1:
            raise InputError(
                f"A table of errors has one number of images per sample, and the cache has "
                f"{described(counts)}: cache lists of one length (`shards convert --samples lists "
                "--list_size`)."
            )
        [self.sides] = counts or {len(SIDES)}
        self.samples = LatentSampleLoader(
            reader, self.seed, data.latents, self.caption_dropout, self.held_out
        )
        super().setup(stage)

    def make(self, group: StoredGroup) -> list[tuple[Tensor, Tensor]]:
        """Return the errors and quantiles of a group, in stored order."""
        [(errors, u)] = self.make_empty(group)
        usable = [
            pair for pair in zip(group.indices, group.samples, strict=True) if self._fits(pair)
        ]
        for start in range(0, len(usable), self.batch_size):
            some = usable[start : start + self.batch_size]
            rows = [index - group.places.start for index, _ in some]
            for draw in range(self.draws):
                errors[rows, draw], u[rows, draw] = self._measured(some, draw)
        return [(errors, u)]

    def make_empty(self, group: StoredGroup) -> list[tuple[Tensor, Tensor]]:
        """Return the rows of pairs that cannot be read."""
        form = len(group.places), self.draws
        errors = torch.full((*form, self.sides), torch.nan)
        return [(errors, torch.full(form, -1.0))]

    def _fits(self, pair: tuple[int, LatentSample]) -> bool:
        try:
            self.samples.view(pair[1], 0)
        except BrokenSample:
            self.left_out["broken pairs"] += 1
            return False
        return True

    @torch.no_grad()
    def _measured(self, some: list[tuple[int, LatentSample]], draw: int) -> tuple[Tensor, Tensor]:
        """Return the errors (B, K) and quantiles of the levels (B,) of one draw, on the CPU."""
        of = 0 if self.held_out else draw
        items = [self.samples.view(one, draw_seed(self.seed, index, of)) for index, one in some]
        batch = move_data_to_device(self.samples.collate(items), self.device)
        pairs = draw_latents(self.backbone, batch).at_draw(draw - of)
        u = discounted(drawing.uniform(pairs.seeds, "t"), self.gamma, self.gamma_steps)
        dilation = self.mask_dilation
        seen = noise_pairs(
            self.backbone.process, pairs, u, masked=self.masked, mask_dilation=dilation
        )
        weights = self.backbone.as_reference() if self.backbone.has_reference else nullcontext()
        with weights:
            errors = predict_errors(self.backbone, seen).value
        return errors.cpu(), u.float()

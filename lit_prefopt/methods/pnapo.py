"""PNAPO: preference optimisation of flows on noise-tracked pairs (arXiv 2605.09433, 2026)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import NoisedPairs, noise_pairs
from lit_prefopt.diffusion.start_noise import check_whole, start_noise
from lit_prefopt.effective_batch import planned_steps
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.processes.rectified_flow import RectifiedFlow


class PNAPO(DiffusionDPO):
    """Diffusion-DPO of a flow, each image with the noise that it was sampled from.

    The noise is drawn again from the seeds that generators store with their samples, so the images
    must be the model family's own, sampled with eta 0 and neither resized nor mirrored. Held-out
    pairs without seeds or scores have one noise for both sides, and f = 1.

    Args:
        beta: Strength of the regularisation to the reference, for each pair multiplied by f and g.
        gap_scale: Factor s of scores in f = 2 sigmoid(s (chosen - rejected)) - 1; off (f = 1) if
            not given.
        anneal: Shares of the training's steps between which g falls from 1 to 1/2 by a cosine.
    """

    needs_known = ("noise_seeds",)
    takes_reference_errors = False

    def __init__(
        self,
        *args: Any,
        beta: float,
        gap_scale: float | None = 1.0,
        anneal: tuple[float, float] = (0.5, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, beta=beta, **kwargs)
        if not isinstance(self.backbone.process, RectifiedFlow):
            raise InputError(
                f"PNAPO interpolates between an image and its noise, as only flows do, and "
                f"{type(self.backbone).__name__} is none: take a flow model, or DiffusionDPO."
            )
        check_number("gap_scale", gap_scale, above=0, optional=True)
        check_number("anneal", anneal[0], 0, 1)
        check_number("anneal", anneal[1], anneal[0], 1)
        self.gap_scale, self.anneal = gap_scale, anneal
        self.planned, self.checked = 0, False

    def on_train_start(self) -> None:
        """Check that images are not mirrored, and note how many steps the training has."""
        super().on_train_start()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StoredPairs) and data.mirrors:
            raise InputError("A mirrored image does not belong to its noise: leave `flip` out.")
        self.planned = planned_steps(self.trainer)

    def add_noise(self, pairs: Pairs) -> NoisedPairs:
        """Add its own noise to each side, at one level drawn from the pair's seed."""
        if pairs.noise_seeds is None and not self.training:
            return super().add_noise(pairs)
        if not self.checked:  # once, since the sizes are read from the device
            check_whole(pairs.frames)
            self.checked = True
        u = self.level_quantiles(draws.uniform(pairs.seeds, "t"))
        return noise_pairs(self.backbone.process, pairs, u, noise=start_noise(pairs))

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return Diffusion-DPO's loss of each pair with its own beta, (B,)."""
        factor = self.beta_factor(pairs)
        return super().losses(ratios._replace(values=ratios.values * factor), pairs)

    def beta_factor(self, pairs: Comparisons) -> Tensor:
        """Return the factor f g of beta for each pair, (B, 1)."""
        first, last = self.anneal
        share = self.global_step / self.planned if self.planned > 0 else 0.0
        place = min(max((share - first) / max(last - first, 1e-9), 0.0), 1.0)
        factor = torch.full_like(pairs.labels, 0.75 + 0.25 * math.cos(math.pi * place))[:, None]
        scores = pairs.scores if isinstance(pairs, Pairs) else None
        if self.gap_scale is None or (scores is None and not self.training):
            return factor
        if scores is None:
            raise InputError(
                "`gap_scale` needs the scores of both images, and these pairs have none: store "
                "them in their .json, or set `--model.gap_scale null`."
            )
        gap = (scores[:, :1] - scores[:, -1:]).clamp(min=0)
        return factor * (2 * torch.sigmoid(self.gap_scale * gap) - 1)

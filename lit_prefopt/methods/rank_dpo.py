"""RankDPO: preference optimisation on ranked lists of images (arXiv 2410.18013, 2024)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.errors import InputError
from lit_prefopt.losses import Comparisons, discounted_gains, preference_loss, smooth
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class RankDPO(DiffusionDPO):
    """Diffusion-DPO on all pairs of a ranked list, weighted by how much their order matters.

    The weight of a pair is the difference of both images' gains times that of their discounts by
    rank, as in DCG (Eq. 6). The loss of a list is the sum over its pairs.

    Args:
        gain: What the gain 2^p - 1 of an image is computed from: `wins` takes for p the share of
            the list's other images that it beats, by score or, without scores, by rank; `scores`
            takes its score, which must be such a share or a probability, such as those of
            `RankedSamples` with `calibrate`.
    """

    trains_on = "lists"

    def __init__(self, *args: Any, gain: Literal["wins", "scores"] = "wins", **kwargs: Any) -> None:
        # it is defined for one rejected image
        super().__init__(*args, chosen_protection=None, **kwargs)
        self.gain = gain

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the weighted loss of each list, (B,) (Eq. 7)."""
        values = ratios.values
        if pairs.sides < 2:
            raise InputError(
                "RankDPO compares the images of a list, and these samples have one image each: "
                "take DiffusionKTO, or store lists of images for each prompt."
            )
        scores = pairs.scores if isinstance(pairs, Pairs) else None
        better, worse = torch.triu_indices(pairs.sides, pairs.sides, 1, device=values.device)
        weights = discounted_gains(self.preferred(values, scores))[:, better, worse]
        labels = smooth(pairs.labels, self.label_smoothing)[:, None]
        differences = values[:, better] - values[:, worse]
        return (weights * preference_loss(differences, labels, self.beta, self.link)).sum(1)

    def preferred(self, values: Tensor, scores: Tensor | None) -> Tensor:
        """Return the share of comparisons that each image of a list wins, (B, K).

        Args:
            values: Log-ratios of the images, best first, (B, K).
            scores: Scores of the images, (B, K), if they are known.
        """
        others = values.shape[1] - 1
        if self.gain == "scores":
            if scores is None:
                raise InputError(
                    "`gain: scores` needs the scores of a list's images, and these have none: "
                    "convert them with `scores`, or set `--model.gain wins`."
                )
            return scores
        if scores is None:
            beaten = torch.arange(others, -1, -1, device=values.device)
            return (beaten / others).expand_as(values)
        return (scores[:, :, None] > scores[:, None]).sum(2) / others

"""Diffusion-KTO: alignment by images that are liked or disliked (arXiv 2404.04465, 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons, kahneman_tversky, smooth
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class DiffusionKTO(DiffusionDPO):
    """Trains on single images with labels, 1 for liked and 0 for disliked.

    An image counts by how far its log-ratio is above or below a baseline, the mean log-ratio of the
    batch on all ranks (at least 0, without gradient). Pairs are read as one liked and one disliked
    image each, with the same timestep and noise.

    Args:
        beta: Strength of the regularisation to the reference, on mean errors without the factor 1/2
            of Diffusion-DPO, as released.
        link: Loss of an image's log-ratio above the baseline (of a disliked one, below it):
            `lit_prefopt.losses.kahneman_tversky`, the loss-averse `.sigmoid`, `.risk_seeking`, or
            any function of that form.
        like_weight: Factor of the loss of liked images.
        dislike_weight: Factor of the loss of disliked images.
    """

    trains_on = "likes"

    def __init__(
        self,
        *args: Any,
        beta: float,
        link: Callable = kahneman_tversky,
        like_weight: float = 1.0,
        dislike_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # of an image alone there is no chosen side, whose error could be added or kept
        super().__init__(*args, beta=beta, link=link, anchor=0.0, chosen_protection=None, **kwargs)
        check_number("like_weight", like_weight, 0)
        check_number("dislike_weight", dislike_weight, 0)
        self.like_weight, self.dislike_weight = like_weight, dislike_weight
        self.baseline = torch.zeros(())

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the drop in error from reference to policy for each image, without the 1/2."""
        ratios = super().log_ratios(pairs)
        return ratios._replace(values=2 * ratios.values)

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the loss of each row, (B,); of a pair the mean over both images."""
        values = ratios.values
        if values.shape[1] > 2:
            raise InputError(
                f"DiffusionKTO trains on single images or pairs, and these lists have "
                f"{values.shape[1]} images: take RankDPO, or store each image with its label."
            )
        # the pair's label says that its first image is the liked one
        liked = torch.stack([pairs.labels, 1 - pairs.labels], 1)[:, : values.shape[1]]
        liked = smooth(liked, self.label_smoothing)
        self.baseline = self.mean_over_ranks(values.detach().mean()).clamp(min=0)
        gain = values - self.baseline
        likes = self.like_weight * liked * self.link(gain, self.beta)
        dislikes = self.dislike_weight * (1 - liked) * self.link(-gain, self.beta)
        return (likes + dislikes).mean(1)

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a training batch, with the baseline as `kl`."""
        return super().measure(ratios, pairs, loss) | {"kl": self.baseline}

"""Consistency targets: adjacent points on a path of the teacher."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lit_prefopt.backbones import Backbone, LatentConsistency
from lit_prefopt.batches import Pairs
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.processes.consistency import pseudo_huber


class ConsistencyPoints(NamedTuple):
    """Noised sides of a batch of pairs, and the same one step of the teacher further on."""

    latents: Tensor  # (B * K, C, H, W) float32 at t
    t: Tensor  # (B,) int64
    lower: Tensor  # (B * K, C, H, W) float32 at t_lower: one DDIM step of the teacher on
    t_lower: Tensor  # (B,) int64
    prompt: Prompt  # B * K rows, with the guidance of the teacher's step
    sides: int  # K

    def upper_prediction(self, backbone: LatentConsistency) -> Tensor:
        """Return the active network's prediction at the noisier point, (B * K, C, H, W)."""
        t = self.t.repeat_interleave(self.sides)
        return backbone.consistent(self.latents, t, self.prompt)

    def lower_prediction(self, backbone: LatentConsistency) -> Tensor:
        """Return the active network's prediction at the cleaner point, (B * K, C, H, W)."""
        t = self.t_lower.repeat_interleave(self.sides)
        return backbone.consistent(self.lower, t, self.prompt)

    def error(self, prediction: Tensor, target: Tensor, delta: float) -> Tensor:
        """Return the distance of two predictions on each side, (B, K) float32."""
        return pseudo_huber(prediction, target, delta).unflatten(0, (-1, self.sides))


def consistency_points(
    backbone: LatentConsistency, pairs: Pairs, w: tuple[float, float]
) -> ConsistencyPoints:
    """Return two points for each side of the pairs; level, noise and guidance are drawn per pair.

    Args:
        backbone: An LCM with its teacher.
        pairs: B pairs.
        w: Smallest and largest guidance in the form of LCMs, drawn uniformly.
    """
    device = pairs.latents.device
    t, t_lower = backbone.process.adjacent_levels(draws.uniform(pairs.seeds, "t", device=device))
    drawn = draws.uniform(pairs.seeds, "guidance", device=device)
    scale = 1 + w[0] + (w[1] - w[0]) * drawn
    # The same noise on all sides: its variance cancels in their difference.
    noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "noise", device)
    sides = pairs.sides
    every, every_t, every_lower, every_scale = (
        x.repeat_interleave(sides, 0) for x in (noise, t, t_lower, scale.float())
    )
    noised = backbone.process.add_noise(pairs.latents.flatten(0, 1), every, every_t)
    prompt = pairs.prompt_per_side.replace(guidance=every_scale)
    lower = backbone.teacher_step(noised, every_t, every_lower, prompt)
    return ConsistencyPoints(noised, t, lower, t_lower, prompt, sides)


def check_lcm(backbone: Backbone, method: str) -> None:
    """Check that a backbone is an LCM with a teacher.

    Args:
        backbone: The recipe's backbone.
        method: Name of the method, for the message.
    """
    if not isinstance(backbone, LatentConsistency):
        raise InputError(
            f"{method} trains latent consistency models and {type(backbone).__name__} is none: "
            "take the backbone LatentConsistency, or a method that trains on denoising errors."
        )
    if backbone.teacher is None:
        raise InputError(
            f"{method} needs the model that the latent consistency model was distilled from: name "
            "it as `--backbone.teacher` (Lykon/dreamshaper-7 for LCM_Dreamshaper_v7)."
        )


def check_guidance(w: tuple[float, float]) -> None:
    """Check a range of guidance."""
    check_number("w[0]", w[0], 0)
    check_number("w[1]", w[1], w[0])

"""Records that are passed from data module to loss, in the order of their creation, with shapes.

B  pairs in a batch           K  sides of a pair (2; more for ranked lists), best side first
C, H, W  channels, height, width: of images (C = 3) or of latents
E  draws at which the reference's errors are known
M  roll-outs of a prompt
S  steps of a roll-out
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError


class ImagePairs(NamedTuple):
    """Decoded images and prompts of a data module, before encoding."""

    # (B, K, 3, H, W) float32 in [-1, 1], best side first; K = 1: images only. From image files
    # they come as uint8, a fourth of the bytes, and the data module scales them on the device.
    images: Tensor
    texts: list[str]  # B prompts; "" where the caption was dropped
    seeds: Tensor  # (B,) int64: all random numbers of the sample are drawn from it
    # (B,) float32: probability that the first side is the better one, usually 1; of single images
    # (K = 1) 1 if they are liked and 0 if not
    labels: Tensor
    weights: Tensor  # (B,) float32: factor of the pair's loss before the mean; usually 1
    keys: list[str]  # B names "shard.tar/000001", for messages
    masks: Tensor | None = None  # (B, 1, H, W) float32: 1 where the sides may differ
    broken: tuple[str, ...] = ()  # names of unreadable samples that were replaced
    frames: Tensor | None = None  # (B, K, 6) int64: see `Prompt`; unknown where not given
    prompt: Prompt | None = None  # B rows, where the texts were embedded before
    records: list[str] | None = None  # B names of encoded images, where they are stored
    mirrored: list[str] | None = None  # those of the mirrored images, where these may come too
    captions: list[str] | None = None  # B texts with those that were dropped, to be stored too
    scores: Tensor | None = None  # (B, K) float32: a judge's scores; unknown where not given
    noise_seeds: Tensor | None = None  # (B, K) int64: seeds of the noise that each side came from

    def best(self) -> ImagePairs:
        """Return only the chosen side (K = 1)."""
        return self._replace(
            images=self.images[:, :1],
            frames=_first_side(self.frames, 1),
            scores=_first_side(self.scores, 1),
            noise_seeds=_first_side(self.noise_seeds, 1),
        )

    def scaled(self) -> ImagePairs:
        """Return the images as float32 in [-1, 1]; decoded uint8 pixels are scaled."""
        whole = self.images.dtype == torch.uint8
        return self._replace(images=scaled(self.images)) if whole else self

    @property
    def sides(self) -> int:
        """Number of sides, K."""
        return self.images.shape[1]


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as contiguous float32 in [-1, 1]."""
    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


class LatentPairs(NamedTuple):
    """Cached posteriors and embedded prompts of a data module, before latents are sampled."""

    mean: Tensor  # (B, K, C, H, W) in the VAE's precision and at its own scale
    deviation: Tensor | None  # (B, K, C, H, W); where it was not cached, the mean is the latent
    prompt: Prompt  # B rows; the empty prompt's where the caption was dropped
    texts: list[str]  # this and the following fields as in `ImagePairs`
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32
    keys: list[str]
    masks: Tensor | None = None  # (B, 1, H, W) float32 at the latents' size
    broken: tuple[str, ...] = ()
    frames: Tensor | None = None  # (B, K, 6) int64
    reference_error: Tensor | None = None  # (B, E, K) float32: see `Pairs`
    records: list[str] | None = None  # as in `ImagePairs`
    scores: Tensor | None = None  # (B, K) float32
    noise_seeds: Tensor | None = None  # (B, K) int64

    def best(self) -> LatentPairs:
        """Return only the chosen side (K = 1)."""
        return self._replace(
            mean=self.mean[:, :1],
            deviation=_first_side(self.deviation, 1),
            frames=_first_side(self.frames, 1),
            reference_error=_first_side(self.reference_error, -1),
            scores=_first_side(self.scores, 1),
            noise_seeds=_first_side(self.noise_seeds, 1),
        )

    @property
    def sides(self) -> int:
        """Number of sides, K."""
        return self.mean.shape[1]


def _first_side(values: Tensor | None, axis: int) -> Tensor | None:
    return None if values is None else values.narrow(axis, 0, 1)


class Pairs(NamedTuple):
    """Latents of all sides and their embedded prompts, as methods train on them."""

    latents: Tensor  # (B, K, C, H, W) float32, scaled as the denoiser expects them
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32
    masks: Tensor | None = None  # (B, 1, H, W) float32 at the latents' size
    frames: Tensor | None = None  # (B, K, 6) int64: see `Prompt`
    # (B, E, K) float32: the reference's errors at the draws of `seeds`, `seeds` + 1, ...;
    # computed by the reference where None
    reference_error: Tensor | None = None
    scores: Tensor | None = None  # (B, K) float32: see `ImagePairs`
    noise_seeds: Tensor | None = None  # (B, K) int64
    advantages: Tensor | None = None  # (B, K) float32: scores relative to those of their prompt

    @property
    def sides(self) -> int:
        """Number of sides, K."""
        return self.latents.shape[1]

    def best(self) -> Pairs:
        """Return only the chosen side (K = 1)."""
        return self._replace(
            latents=self.latents[:, :1],
            frames=_first_side(self.frames, 1),
            reference_error=_first_side(self.reference_error, -1),
            scores=_first_side(self.scores, 1),
            noise_seeds=_first_side(self.noise_seeds, 1),
            advantages=_first_side(self.advantages, 1),
        )

    def at_draw(self, number: int) -> Pairs:
        """Return the same latents with seeds for another draw of timestep and noise."""
        errors = None if self.reference_error is None else self.reference_error[:, number:]
        return self._replace(seeds=self.seeds + number, reference_error=errors)

    @property
    def prompt_per_side(self) -> Prompt:
        """Conditioning of the denoiser for every side: B * K rows."""
        prompt = self.prompt.repeat(self.sides)
        return prompt if self.frames is None else prompt.replace(frames=self.frames.flatten(0, 1))


Batch = ImagePairs | LatentPairs | Pairs
"""Batches of stored pairs that a method accepts."""


class Steps(NamedTuple):
    """Reverse steps of K roll-outs, best first, as on-policy methods train on them.

    Step s of side k goes from `parents[:, k, s]` to `children[:, k, s]`. Parents that all sides
    share are stored once, and the denoiser predicts them once.
    """

    parents: Tensor  # (B, K or 1, S, C, H, W): latents at t
    children: Tensor  # (B, K, S, C, H, W): latents at t_next
    t: Tensor  # (B, S) in the process's dtype: noise levels
    t_next: Tensor  # (B, S), less noisy
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32
    # of methods whose ratios are to the policy that sampled the steps:
    logp: Tensor | None = None  # (B, K, S) float32: log-densities of the steps under it
    means: Tensor | None = None  # (B, K, S, C, H, W): means of the steps under it
    advantages: Tensor | None = None  # (B, K) float32: scores relative to those of their prompt

    @property
    def sides(self) -> int:
        """Number of sides, K."""
        return self.children.shape[1]


class Trajectories(NamedTuple):
    """Complete roll-outs of B prompts, from which steps are sampled; each state is stored once."""

    states: Tensor  # (B, M, S + 1, C, H, W): M roll-outs of a prompt, best first; noise first
    t: Tensor  # (B, S + 1) in the process's dtype: noise levels of the states
    scores: Tensor  # (B, M) float32: the judge's score of each last state
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64
    logp: Tensor | None = None  # (B, M, S) float32: this and the following fields as in `Steps`
    means: Tensor | None = None  # (B, M, S, C, H, W)
    advantages: Tensor | None = None  # (B, M) float32

    def steps(self, which: Tensor, sides: Tensor, numbers: Tensor, seeds: Tensor) -> Steps:
        """Return single steps, the same ones of all sides.

        Args:
            which: Rows, (B',) int64.
            sides: Roll-outs of each row, best first, (B', K) int64.
            numbers: Steps of each row, 0 being the noisiest, (B', S') int64.
            seeds: Seeds of the rows, (B',) int64.
        """
        row, side = which[:, None, None], sides[:, :, None]
        scores = self.scores[which[:, None], sides]
        apart = (scores[:, 0] > scores[:, -1]).float()  # a tie gets weight 0
        at = row, side, numbers[:, None]
        return Steps(
            self.states[row, side, numbers[:, None]].float(),
            self.states[row, side, numbers[:, None] + 1].float(),
            self.t[which[:, None], numbers],
            self.t[which[:, None], numbers + 1],
            self.prompt.rows(which),
            seeds,
            torch.ones_like(apart),
            apart,
            None if self.logp is None else self.logp[at],
            None if self.means is None else self.means[at].float(),
            None if self.advantages is None else self.advantages[which[:, None], sides],
        )


class LogRatios(NamedTuple):
    """Log-ratios of policy to reference, one per side."""

    # (B, K) or, of steps, (B, K, S); not clipped. Of methods with an old policy, policy to that one
    values: Tensor
    t: Tensor  # (B,) or (B, S) in the process's dtype: their noise levels
    policy_error: Tensor | None = None  # (B, K): denoising errors, where there are any
    reference_error: Tensor | None = None  # (B, K)
    overlap: Tensor | None = None  # (B, K): see `losses.rejected_gradient_scale`
    drift: Tensor | None = None  # (B, K): mean squared change of the prediction by training
    terms: dict[str, Tensor] | None = None  # further terms of the loss by name, as `values`

    @property
    def chosen(self) -> Tensor:
        """Log-ratio of the best side: (B,) or (B, S)."""
        return self.values[:, 0]

    @property
    def rejected(self) -> Tensor:
        """Log-ratio of the worst side: (B,) or (B, S)."""
        return self.values[:, -1]

    @property
    def errors(self) -> dict[str, Tensor]:
        """Denoising errors (B, K) by log name, without those that are None."""
        named = {"error": self.policy_error, "reference_error": self.reference_error}
        return {name: errors for name, errors in named.items() if errors is not None}

    def margin(self, beta: float) -> Tensor:
        """Return beta times chosen minus rejected log-ratio: (B,) or (B, S)."""
        return beta * (self.chosen - self.rejected)

    def require(
        self, field: Literal["policy_error", "reference_error", "overlap", "drift"], needed_by: str
    ) -> Tensor:
        """Return a field (B, K) that a loss needs.

        Args:
            field: Name of the field.
            needed_by: Option or method that needs it, for the message.

        Raises:
            InputError: `log_ratios` of the method does not return it.
        """
        value: Tensor | None = getattr(self, field)
        if value is None:
            raise InputError(
                f"{needed_by} needs `{field}`, which this method's `log_ratios` does not return: "
                f"return `LogRatios(..., {field}=...)` there."
            )
        return value

"""The records that travel, in the order in which they are made; every shape is written here.

B  pairs in a batch           K  sides of a pair (2; more for ranked lists), best side first
N  tokens of a prompt         D  width of the prompt's embedding
C, H, W  channels, height, width: of images (C = 3) or of latents
E  draws at which the reference's errors are known
M  roll-outs of a prompt
S  steps of a roll-out, where a method averages over steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class ImagePairs(NamedTuple):
    """What a data module hands out: decoded images and their text, nothing embedded yet."""

    # (B, K, 3, H, W) float32 in [-1, 1], best side first; K = 1: images only. From image files
    # they come as uint8, a fourth of the bytes, and the data module scales them on the device.
    images: Tensor
    texts: list[str]  # B prompts; "" where the caption was dropped
    seeds: Tensor  # (B,) int64: all that is random about the sample is drawn from it
    labels: Tensor  # (B,) float32: probability that the first side is the better one; 1 as a rule
    weights: Tensor  # (B,) float32: factor of the pair's loss before the mean; 1 as a rule
    keys: list[str]  # B names "shard.tar/000001", for messages
    masks: Tensor | None = None  # (B, 1, H, W) float32: 1 where the sides are meant to differ
    broken: tuple[str, ...] = ()  # names of unreadable samples that others stand in for
    frames: Tensor | None = None  # (B, K, 6) int64: see `Prompt`; unknown where not given

    def best(self) -> ImagePairs:
        """Return the chosen side alone (K = 1)."""
        frames = None if self.frames is None else self.frames[:, :1]
        return self._replace(images=self.images[:, :1], frames=frames)

    def scaled(self) -> ImagePairs:
        """Return the images in [-1, 1], where they are still as they were decoded."""
        whole = self.images.dtype == torch.uint8
        return self._replace(images=scaled(self.images)) if whole else self


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1], in the plain order of memory."""
    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


class Prompt(NamedTuple):
    """What the denoiser is told beside the timestep, one row a prompt.

    A model family reads what it knows. A frame says which part of which picture an image is, in
    pixels: the height and width of the original, the upper and left edge of the crop in the
    resized (and, where it was, mirrored) picture, the height and width of what was cut out.
    """

    hidden: Tensor  # (B, N, D): the embedded text, token by token
    pooled: Tensor | None = None  # (B, P): the embedded text as a whole
    frames: Tensor | None = None  # (B, 6) int64; a whole image of the latents' size if not given
    guidance: Tensor | None = None  # (B,) float32: guidance scale, for denoisers that take one

    def repeat(self, times: int) -> Prompt:
        """Return every row `times` times in a row: (B * times, ...), one for each side."""
        return Prompt(*(_repeated(field, times) for field in self))  # type: ignore[arg-type]

    def rows(self, which: Tensor) -> Prompt:
        """Return these rows, (B',) int64."""
        return Prompt(*(None if f is None else f[which] for f in self))  # type: ignore[arg-type]

    def cpu(self) -> Prompt:
        """Return the same on the CPU."""
        return Prompt(*(None if f is None else f.cpu() for f in self))  # type: ignore[arg-type]

    def prepend(self, other: Prompt) -> Prompt:
        """Return the rows of the other prompt and then these; both know the same fields."""
        return Prompt(*map(_joined, other, self))  # type: ignore[arg-type]


def _repeated(field: Tensor | None, times: int) -> Tensor | None:
    return None if field is None else field.repeat_interleave(times, 0)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


class LatentPairs(NamedTuple):
    """What a data module of cached shards hands out: all that is encoded, nothing drawn of it."""

    mean: Tensor  # (B, K, C, H, W) in the VAE's precision and at its own scale
    deviation: Tensor | None  # (B, K, C, H, W); where it is not kept, the mean is the latent
    prompt: Prompt  # B rows; those of the empty prompt where the caption was dropped
    texts: list[str]  # as in `ImagePairs`, and so are those that follow
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32
    keys: list[str]
    masks: Tensor | None = None  # (B, 1, H, W) float32 at the latents' size
    broken: tuple[str, ...] = ()
    frames: Tensor | None = None  # (B, K, 6) int64
    reference_error: Tensor | None = None  # (B, E, K) float32: see `Pairs`

    def best(self) -> LatentPairs:
        """Return the chosen side alone (K = 1)."""
        return self._replace(
            mean=self.mean[:, :1],
            deviation=None if self.deviation is None else self.deviation[:, :1],
            frames=None if self.frames is None else self.frames[:, :1],
            reference_error=_first_side(self.reference_error),
        )


def _first_side(errors: Tensor | None) -> Tensor | None:
    return None if errors is None else errors[..., :1]


class Pairs(NamedTuple):
    """What a method learns from: latents of all sides and their embedded prompt."""

    latents: Tensor  # (B, K, C, H, W) float32, scaled as the denoiser expects them
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32
    masks: Tensor | None = None  # (B, 1, H, W) float32 at the latents' size
    frames: Tensor | None = None  # (B, K, 6) int64: see `Prompt`
    # (B, E, K) float32: what the reference's errors are at the draws of `seeds`, `seeds` + 1, ...;
    # where they are not given, the reference is asked
    reference_error: Tensor | None = None

    @property
    def sides(self) -> int:
        """K, the number of sides."""
        return self.latents.shape[1]

    def best(self) -> Pairs:
        """Return the chosen side alone (K = 1)."""
        frames = None if self.frames is None else self.frames[:, :1]
        errors = _first_side(self.reference_error)
        return self._replace(latents=self.latents[:, :1], frames=frames, reference_error=errors)

    def at_draw(self, number: int) -> Pairs:
        """Return the same latents with the seeds of another draw of timestep and noise."""
        errors = None if self.reference_error is None else self.reference_error[:, number:]
        return self._replace(seeds=self.seeds + number, reference_error=errors)

    @property
    def prompt_per_side(self) -> Prompt:
        """What the denoiser is told of every side: B * K rows."""
        prompt = self.prompt.repeat(self.sides)
        return prompt if self.frames is None else prompt._replace(frames=self.frames.flatten(0, 1))


Batch = ImagePairs | LatentPairs | Pairs
"""What a method may be handed."""


class Steps(NamedTuple):
    """What an on-policy method learns from: reverse steps of K roll-outs, the best one first.

    Step s of side k goes from `parents[:, k, s]` to `children[:, k, s]`. Parents that all sides
    have in common are there once, and so are asked of the denoiser once.
    """

    parents: Tensor  # (B, K or 1, S, C, H, W): latents at t
    children: Tensor  # (B, K, S, C, H, W): latents at t_next
    t: Tensor  # (B, S) int64
    t_next: Tensor  # (B, S) int64, less noisy
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32

    @property
    def sides(self) -> int:
        """K, the number of sides."""
        return self.children.shape[1]


class Trajectories(NamedTuple):
    """Whole roll-outs of B prompts, kept to draw steps from; every state is kept once."""

    states: Tensor  # (B, M, S + 1, C, H, W): M roll-outs of a prompt, the best first; noise first
    t: Tensor  # (B, S + 1) int64: timesteps of the states
    scores: Tensor  # (B, M) float32: what the judge says of each last state
    prompt: Prompt  # B rows
    seeds: Tensor  # (B,) int64

    def steps(self, which: Tensor, sides: Tensor, numbers: Tensor, seeds: Tensor) -> Steps:
        """Return single steps, the same ones of all sides.

        Args:
            which: Rows, (B',) int64.
            sides: Which roll-outs of each, the best first, (B', K) int64.
            numbers: Which steps of each, 0 being the noisiest, (B', S') int64.
            seeds: From which they were drawn, (B',) int64.
        """
        row, side = which[:, None, None], sides[:, :, None]
        scores = self.scores[which[:, None], sides]
        apart = (scores[:, 0] > scores[:, -1]).float()  # a tie says nothing
        return Steps(
            self.states[row, side, numbers[:, None]].float(),
            self.states[row, side, numbers[:, None] + 1].float(),
            self.t[which[:, None], numbers],
            self.t[which[:, None], numbers + 1],
            self.prompt.rows(which),
            seeds,
            torch.ones_like(apart),
            apart,
        )


Rows = TypeVar("Rows", Steps, Trajectories)
"""A record whose tensors all have one row per sample."""


def tensors_by_name(record: Steps | Trajectories) -> dict[str, Tensor]:
    """Return all tensors of a record by name, those of its prompt as `prompt.NAME`."""
    prompt = {f"prompt.{name}": value for name, value in record.prompt._asdict().items()}
    named = {**record._asdict(), **prompt}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def record_from_tensors(kind: type[Rows], tensors: Mapping[str, Tensor]) -> Rows:
    """Return the record that `tensors_of` took apart."""
    prefix = "prompt."
    prompt = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    others = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return kind(prompt=Prompt(**prompt), **others)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, one after the other."""
    named = [tensors_by_name(part) for part in parts]
    return record_from_tensors(
        type(parts[0]), {k: torch.cat([n[k] for n in named]) for k in named[0]}
    )


def select_rows(record: Rows, which: Tensor | slice) -> Rows:
    """Return some rows; those of a slice share the record's memory."""
    return record_from_tensors(
        type(record), {k: v[which] for k, v in tensors_by_name(record).items()}
    )


class LogRatios(NamedTuple):
    """How much likelier the policy finds each side than the reference does."""

    values: Tensor  # (B, K) or, where a method averages over steps, (B, K, S); not clipped
    t: Tensor  # (B,) or (B, S) int64: the timesteps that they were measured at
    policy_error: Tensor | None = None  # (B, K): denoising errors, where there are any
    reference_error: Tensor | None = None  # (B, K)
    overlap: Tensor | None = None  # (B, K): see `losses.rejected_gradient_scale`

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
        """The errors (B, K) that there are, by the name under which they are logged."""
        named = {"error": self.policy_error, "reference_error": self.reference_error}
        return {name: errors for name, errors in named.items() if errors is not None}

    def margin(self, beta: float) -> Tensor:
        """Return beta times chosen minus rejected log-ratio: (B,) or (B, S)."""
        return beta * (self.chosen - self.rejected)

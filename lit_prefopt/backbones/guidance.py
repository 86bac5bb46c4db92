"""Classifier-free guidance (arXiv 2207.12598) in the conventions of the stock pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_prefopt.conditioning import Prompt

Predict = Callable[[Tensor, Tensor, Prompt], Tensor]
"""Prediction at latents (B, C, H, W), noise levels (B,) and B prompts."""

Combine = Callable[[Tensor, Tensor, float], Tensor]
"""Function of the predictions with and without the prompt, (B, C, H, W) float32, and the scale."""


def linear(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return `without + scale * (with_prompt - without)`, as most families."""
    return without + scale * (with_prompt - without)


@dataclass(frozen=True)
class Guidance:
    """How a family's stock pipeline guides: its calls of the denoiser, and what they become.

    Args:
        batch: Order of a batch with both prompts, or `separate` for a call with the prompt and one
            without it, whose text may have other lengths.
        combine: Combines both predictions.
        off: Scale without guidance, for which the denoiser is called once.
    """

    batch: Literal["negative-positive", "positive-negative", "separate"] = "negative-positive"
    combine: Combine = linear
    off: float = 1.0

    def __call__(
        self,
        predict: Predict,
        latents: Tensor,
        t: Tensor,
        prompt: Prompt,
        empty: Prompt,
        scale: float,
    ) -> Tensor:
        """Return the guided prediction, (B, C, H, W) float32.

        Args:
            predict: The denoiser.
            latents: (B, C, H, W).
            t: Noise levels, (B,).
            prompt: B rows.
            empty: The empty prompt, one row.
            scale: Guidance scale in the family's convention, other than `off`.
        """
        negative = empty.repeat(len(latents)).replace(frames=prompt.frames)
        prompt = prompt.replace(guidance=None)
        if self.batch == "separate":
            with_prompt = predict(latents, t, prompt).float()
            without = predict(latents, t, negative).float()
        else:
            first = self.batch == "positive-negative"
            both = negative.prepend(prompt) if first else prompt.prepend(negative)
            twice = predict(latents.repeat(2, 1, 1, 1), t.repeat(2), both).float()
            with_prompt, without = twice.chunk(2) if first else twice.chunk(2)[::-1]
        return self.combine(with_prompt, without, scale)

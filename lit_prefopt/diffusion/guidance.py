"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.conditioning import Prompt


def guided(
    backbone: Backbone,
    latents: Tensor,
    t: Tensor,
    prompt: Prompt,
    guidance: float,
) -> Tensor:
    """Return the guided prediction, (B, C, H, W) float32; gradients flow through both halves.

    The half without prompt is the negative model's, if the backbone has one.

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        latents: (B, C, H, W).
        t: Noise levels, (B,).
        prompt: B rows.
        guidance: Scale in the family's convention; 1 is without for most. A denoiser conditioned on
            the scale needs one forward.
    """
    if backbone.takes_guidance:
        scale = torch.full((len(latents),), guidance, device=latents.device)
        return backbone.predict(latents, t, prompt.replace(guidance=scale)).float()
    if guidance == backbone.GUIDANCE.off:
        return backbone.predict(latents, t, prompt).float()
    if backbone.policy.negative is not None:
        with_prompt = backbone.predict(latents, t, prompt.replace(guidance=None)).float()
        empty = backbone.empty.repeat(len(latents)).replace(frames=prompt.frames)
        with backbone.policy.as_negative():
            without = backbone.predict(latents, t, empty).float()
        return backbone.GUIDANCE.combine(with_prompt, without, guidance)
    return backbone.GUIDANCE(backbone.predict, latents, t, prompt, backbone.empty, guidance)

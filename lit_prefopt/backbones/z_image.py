"""Z-Image: a language model, Qwen3, a transformer of one stream over lists, a VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.text_encoders import ChatText
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.families.z_image import Z_IMAGE
from lit_prefopt.processes.flow_schedule import STEPS
from lit_prefopt.processes.flow_shift import linear_shift
from lit_prefopt.processes.settings import Sampling

TURBO_SHIFT = 3.0
"""Shift of the scheduler of Z-Image-Turbo; Z-Image has 6, and both have the same transformer."""


class ThinkingText(ChatText):
    """A Qwen3 whose chat template leaves room for reasoning."""

    THINKING = True


def beyond(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return `with_prompt + scale * (with_prompt - without)`, the usual scale being one more."""
    return with_prompt + scale * (with_prompt - without)


class ZImage(TransformerBackbone):
    """Z-Image (arXiv 2511.22699; hub name Tongyi-MAI/Z-Image).

    `sampling.guidance` is that of the stock pipeline, in which 0 is without guidance, and 5, its
    default, is classifier-free guidance with the usual scale of 6.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        distilled: Train Z-Image-Turbo, whose scheduler has shift 3, although training at all noise
            levels undoes its distillation; also for other checkpoints with that shift.
    """

    FAMILY = Z_IMAGE
    ENCODERS: ClassVar = {"text_encoder": ThinkingText}
    GUIDANCE = Guidance("positive-negative", combine=beyond, off=0.0)
    MU = linear_shift
    LINEAR = "float32"

    def __init__(self, pretrained: str, *, distilled: bool = False, **kwargs: Any) -> None:
        super().__init__(pretrained, distilled=distilled, **kwargs)

    def distilled(self, parts: Components) -> str | None:
        """Return why the checkpoint seems to be Z-Image-Turbo, or None if it does not."""
        config = parts.scheduler()
        if config.get("use_dynamic_shifting") or config.get("shift", 1.0) != TURBO_SHIFT:
            return None
        return "its scheduler has shift 3, as Z-Image-Turbo, where Z-Image has 6"

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the last hidden states but one of their tokens, without padding."""
        self.require_encoders("Embedding prompts")
        encoder = self.texts["text_encoder"]
        tokens = encoder.tokenize(texts)
        states = encoder.encode_tokens(tokens, output_hidden_states=True).hidden_states[-2]
        return Prompt({"hidden": encoder.unpadded(states, tokens)})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W): minus what the network returns at time 1 - t."""
        predicted = self.policy.net(
            [*latents.unsqueeze(2)],
            (STEPS - (STEPS * t).float()) / STEPS,
            [row.to(self.dtype) for row in prompt.ragged("hidden")],
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        return -torch.stack(predicted).squeeze(2)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width = self.policy.denoiser.config.cap_feat_dim
        return super().latent_settings() | {"text": {"hidden": width}}

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=50, guidance=5.0, batch_size=4)

    @property
    def largest_side(self) -> int | None:
        """Largest side of images in pixels: the transformer's table of positions."""
        return min(self.policy.denoiser.config.axes_lens[1:]) * self.size_multiple

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected: dict[str, Any] = {"siglip_feat_dim": None}
        if encoders:
            expected["cap_feat_dim"] = encoders["text_encoder"].config.hidden_size
        check_transformer(net, expected, source, type(self).__name__)
        if self.PATCH not in net.config.all_patch_size:
            raise InputError(
                f"The transformer of {source} has tokens of {net.config.all_patch_size} latents, "
                f"and {type(self).__name__} has squares of {self.PATCH}: name one of this family."
            )

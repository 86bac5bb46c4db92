"""Lumina Image 2.0: a language model, Gemma 2, a transformer of one stream, a VAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance, linear
from lit_prefopt.backbones.text_encoders import SystemPromptText
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.families.lumina2 import LUMINA2
from lit_prefopt.processes.flow_schedule import STEPS
from lit_prefopt.processes.settings import Sampling


def with_row_lengths(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the guided prediction, each row scaled to its length in the prompted one."""
    guided = linear(with_prompt, without, scale)
    return guided * (with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Lumina2(TransformerBackbone):
    """Lumina Image 2.0 (arXiv 2503.21758; hub name Alpha-VLLM/Lumina-Image-2.0).

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        text_tokens: Number of tokens to which the system prompt with a prompt is cut: the stock
            pipeline's `max_sequence_length`.
        system_prompt: Text before each prompt; the stock pipeline's if not given.
        rescale_guidance: Scale each row of a guided prediction to its length without guidance: the
            stock pipeline's `cfg_normalization`.
    """

    FAMILY = LUMINA2
    ENCODERS: ClassVar = {"text_encoder": SystemPromptText}
    GUIDANCE = Guidance("separate", combine=with_row_lengths)
    LINEAR = True

    def __init__(
        self,
        pretrained: str,
        *,
        text_tokens: int = 256,
        system_prompt: str | None = None,
        rescale_guidance: bool = True,
        **kwargs: Any,
    ) -> None:
        check_number("text_tokens", text_tokens, 1)
        stock: str = LUMINA2.pipeline(*[None] * 5).system_prompt  # without components
        self.system_prompt = stock if system_prompt is None else system_prompt
        self.text_tokens = text_tokens
        super().__init__(pretrained, **kwargs)
        if not rescale_guidance:
            self.GUIDANCE = replace(self.GUIDANCE, combine=linear)
        text: Any
        for text in self.texts.values():
            text.length, text.system_prompt = text_tokens, self.system_prompt

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the last hidden states but one of their tokens, without padding."""
        self.require_encoders("Embedding prompts")
        encoder = self.texts["text_encoder"]
        tokens = encoder.tokenize(texts)
        outputs = encoder.encode_tokens(tokens, output_hidden_states=True, use_cache=False)
        return Prompt({"hidden": encoder.unpadded(outputs.hidden_states[-2], tokens)})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W): minus what the network returns at time 1 - t."""
        hidden, mask = prompt.ragged("hidden").padded()
        rest = self.text_tokens - hidden.shape[1]  # as the stock pipeline pads; masked
        predicted: Tensor = self.policy.net(
            hidden_states=latents,
            timestep=1 - (STEPS * t).float() / STEPS,
            encoder_hidden_states=pad(hidden, (0, 0, 0, rest)).to(self.dtype),
            encoder_attention_mask=pad(mask.long(), (0, rest)),
            attention_kwargs=None,
            return_dict=False,
        )[0]
        return -predicted

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width = self.policy.denoiser.config.cap_feat_dim
        own = {"tokens": self.text_tokens, "system_prompt": self.system_prompt}
        return super().latent_settings() | {"text": {"hidden": width}} | own

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=30, guidance=4.0, batch_size=4)

    @property
    def largest_side(self) -> int | None:
        """Largest side of images in pixels: the transformer's table of positions."""
        return min(self.policy.denoiser.config.axes_lens[1:]) * self.size_multiple

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        expected: dict[str, Any] = {"patch_size": self.PATCH}
        if encoders:
            expected["cap_feat_dim"] = encoders["text_encoder"].config.hidden_size
        check_transformer(net, expected, source, type(self).__name__)
        if self.text_tokens >= (most := net.config.axes_lens[0]):
            raise InputError(
                f"The transformer of {source} has positions for {most - 1} tokens of a prompt: set "
                f"`--backbone.text_tokens` to {most - 1} or less."
            )

"""Qwen-Image: a language model, a transformer of double blocks, and a video VAE for one frame."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.backbones.component_checks import check_transformer
from lit_prefopt.backbones.guidance import Guidance, linear
from lit_prefopt.backbones.packing import pack, unpack
from lit_prefopt.backbones.template_text import TemplateText
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.backbones.video_vae import VideoVAEBackbone
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import check_number
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.processes.flow_shift import linear_shift
from lit_prefopt.processes.settings import Sampling


def with_length_of_prompted(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the guided prediction, each token scaled to its length in the prompted one."""
    prompted = pack(with_prompt).contiguous()
    guided = pack(linear(with_prompt, without, scale)).contiguous()
    lengths = [tokens.norm(dim=-1, keepdim=True) for tokens in (prompted, guided)]
    return unpack(guided * (lengths[0] / lengths[1]), *with_prompt.shape[-2:])


class QwenImage(VideoVAEBackbone, TransformerBackbone):
    """Qwen-Image or Qwen-Image-2512 (arXiv 2508.02324), from the hub or a folder.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        text_tokens: Number of tokens to which a prompt is cut, at most 1024: the stock pipeline's
            `max_sequence_length`. Prompts are not padded.
    """

    FAMILY = QWEN_IMAGE
    ENCODERS: ClassVar = {"text_encoder": TemplateText}
    MU = linear_shift
    LINEAR = True
    GUIDANCE = Guidance("separate", combine=with_length_of_prompted)
    EMPTY = " "

    def __init__(self, pretrained: str, *, text_tokens: int = 512, **kwargs: Any) -> None:
        check_number("text_tokens", text_tokens, 1, 1024)
        super().__init__(pretrained, **kwargs)
        self.text_tokens = text_tokens
        for text in self.texts.values():
            text.length = text_tokens

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts, each with as many tokens as it has; an empty one as guidance does."""
        self.require_encoders("Embedding prompts")
        encoder: Any = self.texts["text_encoder"]
        return Prompt({"hidden": encoder.rows([text or self.EMPTY for text in texts])})

    def velocity(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the velocity, (B, C, H, W); prompts of one length need no mask."""
        ragged, (height, width) = prompt.ragged("hidden"), latents.shape[-2:]
        hidden, mask = ragged.padded()
        shape = (1, height // self.PATCH, width // self.PATCH)
        predicted: Tensor = self.policy.net(
            hidden_states=pack(latents),
            timestep=self.rounded_time(t),
            guidance=None,
            encoder_hidden_states_mask=mask.long() if len({*ragged.lengths}) > 1 else None,
            encoder_hidden_states=hidden.to(self.dtype),
            img_shapes=[[shape]] * len(latents),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the transformer requires, by name."""
        width = self.policy.denoiser.config.joint_attention_dim
        return super().latent_settings() | {"text": {"hidden": width}, "tokens": self.text_tokens}

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings: steps and guidance of the stock pipeline."""
        return Sampling(steps=50, guidance=4.0, batch_size=4)

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        # editing and layers, and an embedding of the guidance scale that no checkpoint has
        switches = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")
        expected: dict[str, Any] = dict.fromkeys(switches, False)
        expected |= {"patch_size": self.PATCH, "out_channels": net.config.in_channels // 4}
        for encoder in encoders.values():
            expected["joint_attention_dim"] = encoder.config.get_text_config().hidden_size
        check_transformer(net, expected, source, type(self).__name__)

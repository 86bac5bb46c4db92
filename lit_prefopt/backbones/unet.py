"""Base class of families with a UNet over latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from lit_prefopt.backbones.build_process import build_process
from lit_prefopt.backbones.component_checks import check_unet
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.backbones.loading import Components
from lit_prefopt.conditioning import Prompt
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.marks import mark_metadata
from lit_prefopt.processes.variance_preserving import VariancePreserving


class UNetBackbone(LatentBackbone):
    """A UNet over the latents of a VAE; a family adds how prompts are embedded.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        prediction: Prediction type of the denoiser, if the checkpoint's scheduler is wrong. The
            marks of a single file (`v_pred`, `ztsnr`, or its metadata) are read without it.
        zero_terminal_snr: Whether the noise schedule ends in pure noise, as that of most SDXL
            models with v prediction, if the checkpoint does not state it or is wrong.
        guidance: Guidance scale that conditions a guidance-distilled UNet in training.
    """

    ADDITION: ClassVar[str | None] = None
    """Additional conditioning of the UNet (`addition_embed_type` of its configuration)."""

    EMPTY_IS_ZERO: ClassVar[bool] = False
    """Whether the empty prompt is embedded as zeros, if the pipeline's configuration is silent."""

    process: VariancePreserving

    PROCESS: ClassVar[type[VariancePreserving]] = DiscreteProcess
    """Class of the noise process."""

    extra_conditioning: Callable[[Tensor, Tensor, dict[str, Any]], dict[str, Any]] | None = None
    """Function of latents, timesteps and conditioning that returns more of it (ControlNet)."""

    def __init__(
        self,
        pretrained: str,
        *,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
        zero_terminal_snr: bool | None = None,
        guidance: float = 7.5,
        **kwargs: Any,
    ) -> None:
        process = partial(
            build_process,
            self.PROCESS,
            prediction=prediction,
            zero_terminal_snr=zero_terminal_snr,
        )
        super().__init__(pretrained, process=process, without=(), **kwargs)
        self.guidance = guidance

    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the prediction of the active network, (B, C, H, W)."""
        kwargs, latents = self.denoiser_kwargs(prompt, latents), latents.to(self.dtype)
        if self.extra_conditioning is not None:
            kwargs |= self.extra_conditioning(latents, t, kwargs)
        return self.policy.net(latents, t, **kwargs).sample

    def denoiser_kwargs(self, prompt: Prompt, latents: Tensor) -> dict[str, Any]:
        """Return the UNet's conditioning keyword arguments.

        Args:
            prompt: B embedded prompts.
            latents: (B, C, H, W), for their number, size and device.
        """
        kwargs: dict[str, Any] = {"encoder_hidden_states": prompt["hidden"].to(self.dtype)}
        if self.takes_guidance:
            scale = prompt.guidance
            if scale is None:
                scale = torch.full((len(latents),), self.guidance, device=latents.device)
            # As in consistency distillation (arXiv 2310.04378), the embedded value is scale - 1.
            width = self.policy.denoiser.config.time_cond_proj_dim
            embedded = get_timestep_embedding((scale - 1) * 1000, width)
            kwargs["timestep_cond"] = embedded.to(self.dtype)
        return kwargs

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale conditions the UNet, so that one forward is enough."""
        return self.policy.denoiser.config.time_cond_proj_dim is not None

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the UNet requires, by name."""
        config = self.policy.denoiser.config
        width = config.cross_attention_dim
        text = {"hidden": width if isinstance(width, int) else width[0]}
        if self.ADDITION is not None:
            whole = config.projection_class_embeddings_input_dim
            text["pooled"] = whole - 6 * config.addition_time_embed_dim
        return super().latent_settings() | {"text": text}

    def _marks(self) -> dict[str, str]:
        predicts_v = self.process.prediction == "v_prediction"
        return mark_metadata(predicts_v, self.process.zero_terminal_snr)

    def _read_options(self, parts: Components) -> None:
        self.empty_is_zero = parts.option("force_zeros_for_empty_prompt", self.EMPTY_IS_ZERO)

    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        check_unet(net, [*encoders.values()], source, type(self).__name__, self.ADDITION)

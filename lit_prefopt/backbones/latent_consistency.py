"""Latent consistency models distilled from Stable Diffusion, with their teacher."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lit_prefopt.backbones.load_component import load_component
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.stable_diffusion import StableDiffusion
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.processes.consistency import ConsistencyProcess
from lit_prefopt.processes.schedule import check_scheduler
from lit_prefopt.processes.settings import Sampling


class LatentConsistency(StableDiffusion):
    """A latent consistency model (LCM, arXiv 2310.04378) with Stable Diffusion's architecture.

    Its UNet is conditioned on the guidance scale, and images are sampled in a few steps.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        teacher: Hub name or folder of the model that it was distilled from, or of that model's
            UNet, for methods that need it. Prompts are embedded by this model's text encoder. The
            teacher is frozen, has the precision `dtype`, and is in no checkpoint.
        guidance_width: Width of a guidance embedding that is added to a UNet without one, to
            distil it. The new layer is initialised to zero, so that student and teacher agree.
    """

    process: ConsistencyProcess

    PROCESS = ConsistencyProcess

    def __init__(
        self,
        pretrained: str,
        teacher: str | None = None,
        guidance_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, **kwargs)
        if guidance_width is not None:
            self._add_guidance(guidance_width)
        if not self.takes_guidance:
            raise InputError(
                f"The UNet of {kwargs.get('denoiser') or pretrained} has no guidance embedding, so "
                "it is no latent consistency model: name one, or, to distil it, give "
                "`--backbone.guidance_width 256`."
            )
        frozen: Any = self.policy.frozen
        if frozen is not None and frozen.config.time_cond_proj_dim is None:
            raise InputError(
                f"The reference {kwargs.get('reference')} has no guidance embedding, so it is no "
                "latent consistency model: name one as `--backbone.reference`, or `initial`."
            )
        if guidance_width is not None:
            self.start = None  # the denoiser of the checkpoint has no guidance embedding
        self.teacher: UNet2DConditionModel | None = None
        if teacher is not None:
            self.teacher = freeze(self._load_teacher(teacher))

    def consistent(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the consistency function of the active network, (B, C, H, W) float32.

        Args:
            latents: (B, C, H, W).
            t: (B,) int64.
            prompt: B rows.
        """
        return self.process.consistent(self.predict(latents, t, prompt), latents, t)

    @torch.no_grad()
    def teacher_step(self, latents: Tensor, t: Tensor, t_next: Tensor, prompt: Prompt) -> Tensor:
        """Return the teacher's guided DDIM step from t to t_next, (B, C, H, W) float32.

        Args:
            latents: (B, C, H, W).
            t: (B,) int64.
            t_next: (B,) int64, less noisy.
            prompt: B rows; their `guidance` is the classifier-free guidance scale.
        """
        if self.teacher is None:
            raise InputError(
                "This method needs the model that the latent consistency model was distilled from: "
                "name it as `--backbone.teacher` (Lykon/dreamshaper-7 for LCM_Dreamshaper_v7)."
            )
        if prompt.guidance is None:
            raise InputError(
                "A teacher's step needs a guidance scale per prompt: give it as "
                "`prompt.replace(guidance=scale)`."
            )
        hidden = prompt["hidden"], self.empty["hidden"].expand_as(prompt["hidden"])
        twice = self.teacher(
            latents.repeat(2, 1, 1, 1).to(self.frozen_dtype),
            t.repeat(2),
            encoder_hidden_states=torch.cat(hidden).to(self.frozen_dtype),
        ).sample.float()
        with_prompt, without = twice.chunk(2)
        # the form of guidance in LCMs: w = 0 is without guidance
        w = (prompt.guidance - 1).view(-1, 1, 1, 1)
        prediction = with_prompt + w * (with_prompt - without)
        return self.process.step(prediction, latents, t, t_next, Sampling(eta=0.0)).mean

    def freeze(self) -> None:
        """Freeze all parameters and drop reference and teacher, for inference only."""
        super().freeze()
        self.teacher = None

    @property
    def sampling(self) -> Sampling:
        """Steps and guidance of the stock pipeline of LCMs."""
        return Sampling(steps=4, guidance=8.5, batch_size=8)

    def _add_guidance(self, width: int) -> None:
        """Add zero-initialised guidance embeddings to policy and reference."""
        if self.takes_guidance:
            raise InputError(
                "The UNet has a guidance embedding already: leave `--backbone.guidance_width` out."
            )
        if self.policy.adapter:
            raise InputError(
                "A new guidance embedding cannot be trained as an adapter: leave `--backbone.lora` "
                "out, or name a UNet that has the embedding."
            )
        unets: list[Any] = [self.policy.denoiser, self.policy.frozen]  # diffusers is untyped
        for unet in filter(None, unets):
            embedding = unet.time_embedding
            layer = nn.Linear(width, embedding.linear_1.in_features, bias=False, dtype=unet.dtype)
            nn.init.zeros_(layer.weight)
            embedding.cond_proj = layer.requires_grad_(unet is self.policy.denoiser)
            unet.register_to_config(time_cond_proj_dim=width)

    def _load_teacher(self, source: str) -> UNet2DConditionModel:
        config = dict(self.policy.denoiser.config)
        teacher = load_component(
            UNet2DConditionModel, source, "unet", self.frozen_dtype, config=lambda: config
        )
        own = {name: text.network for name, text in self.texts.items()}
        self._check_denoiser(teacher, own, source)
        if teacher.config.time_cond_proj_dim is not None:
            raise InputError(
                f"{source} is a guidance-distilled model itself: name the model that it was "
                "distilled from as `--backbone.teacher`."
            )
        with suppress(OSError):  # a UNet's folder has no scheduler
            config = DDPMScheduler.load_config(source, subfolder="scheduler")
            check_scheduler(config)
            stated = config.get("prediction_type", "epsilon")  # older checkpoints omit it
            if stated != self.process.prediction:
                raise InputError(
                    f"The teacher {source} predicts {stated} and the latent consistency model "
                    f"{self.process.prediction}: name the model that it was distilled from."
                )
        return teacher

"""Stable Diffusion 1.x: one CLIP text encoder, a UNet, a VAE."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lit_prefopt.backbones.backbone import Backbone
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.reference import Policy, freeze
from lit_prefopt.backbones.sizes import check_size
from lit_prefopt.batches import Prompt
from lit_prefopt.configs import find_config
from lit_prefopt.diffusion.process import DiscreteProcess
from lit_prefopt.errors import InputError

DType = Literal["float32", "bfloat16", "float16"]


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x from a hub name or a local diffusers folder.

    Args:
        pretrained: Hub name or folder of a whole pipeline in diffusers' layout.
        denoiser: What training starts from: a folder with another UNet, or a .json configuration
            for one with fresh weights; the pipeline's own UNet where it is not given.
        lora: Train an adapter of this form; all weights of the UNet where it is not given.
        reference: `initial` for the weights that training starts from (with LoRA the UNet without
            its adapter, else a frozen copy), `none`, or a folder with another UNet.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        dtype: Precision of VAE and text encoder, and under LoRA of the UNet below it. What is
            trained is float32, and so is a frozen copy of it, since the two must agree exactly.
        variant: Variant of the pipeline's files, such as `fp16`.
    """

    def __init__(
        self,
        pretrained: str,
        denoiser: str | None = None,
        lora: LoRA | None = None,
        reference: str = "initial",
        gradient_checkpointing: bool = False,
        dtype: DType = "float32",
        variant: str | None = None,
    ) -> None:
        _check_folder(pretrained)
        frozen_dtype: torch.dtype = getattr(torch, dtype)
        unet_dtype = frozen_dtype if lora else torch.float32
        config = _scheduler_config(pretrained)
        unet = _load_unet(denoiser or pretrained, unet_dtype, None if denoiser else variant)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        super().__init__(_policy(unet, lora, reference), DiscreteProcess(config))
        self.dtype = unet_dtype
        self.vae = AutoencoderKL.from_pretrained(
            pretrained, subfolder="vae", torch_dtype=frozen_dtype, variant=variant
        )
        self.text_encoder = CLIPTextModel.from_pretrained(
            pretrained, subfolder="text_encoder", dtype=frozen_dtype, variant=variant
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(pretrained, subfolder="tokenizer")
        freeze(self.vae)
        freeze(self.text_encoder)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts: the text encoder's last state after its final layer norm."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            return Prompt(self.text_encoder(tokens.to(device)).last_hidden_state)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the scaled latents, float32."""
        check_size(images, self.vae)
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the prediction of the network that speaks now, (B, C, H, W)."""
        return self.policy.net(
            latents.to(self.dtype), t, encoder_hidden_states=prompt.hidden.to(self.dtype)
        ).sample

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1], float32."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(scaled).sample.float().clamp(-1, 1)

    def save(self, folder: Path) -> Path:
        """Write a LoRA file that `load_lora_weights` takes, or a UNet for `from_pretrained`."""
        unet = self.policy.denoiser
        if not self.policy.adapter:
            unet.save_pretrained(folder / "unet")
            return folder / "unet"
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            **_collate_lora_metadata({"unet": unet}),
        )
        return folder / "pytorch_lora_weights.safetensors"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents at the checkpoint's own size."""
        config = self.policy.denoiser.config
        return config.in_channels, config.sample_size, config.sample_size


def _policy(unet: UNet2DConditionModel, lora: LoRA | None, reference: str) -> Policy:
    speaker: UNet2DConditionModel | Literal["adapter-off"] | None = None
    if reference not in ("initial", "none"):
        speaker = freeze(_load_unet(reference, unet.dtype))
    elif reference == "initial":
        speaker = "adapter-off" if lora else freeze(copy.deepcopy(unet))
    if lora is not None:
        lora.add_to(unet)
    return Policy(unet, speaker)


def _load_unet(source: str, dtype: torch.dtype, variant: str | None = None) -> UNet2DConditionModel:
    """Return the UNet of a pipeline or of a folder of its own, or a fresh one."""
    if source.endswith(".json"):
        config = json.loads(find_config(source).read_text("utf-8"))
        return UNet2DConditionModel.from_config(config).to(dtype)
    own_folder = (Path(source) / "config.json").is_file()
    return UNet2DConditionModel.from_pretrained(
        source, subfolder=None if own_folder else "unet", torch_dtype=dtype, variant=variant
    )


def _scheduler_config(pretrained: str) -> dict:
    """Return the scheduler's configuration: the first thing that is asked of a checkpoint."""
    try:
        return DDPMScheduler.load_config(pretrained, subfolder="scheduler")
    except OSError as error:
        raise InputError(
            f"{pretrained} is neither a local folder in diffusers' layout nor a name that the hub "
            "answers to now: check the spelling, the connection, and access to gated models."
        ) from error


def _check_folder(pretrained: str) -> None:
    if not Path(pretrained).is_dir():
        return
    parts = ("scheduler", "text_encoder", "tokenizer", "vae")
    missing = [part for part in parts if not (Path(pretrained) / part).is_dir()]
    if missing:
        raise InputError(
            f"{pretrained} has no {' and no '.join(missing)}: name the folder of a whole Stable "
            "Diffusion pipeline, and give a UNet alone as `backbone.denoiser`."
        )

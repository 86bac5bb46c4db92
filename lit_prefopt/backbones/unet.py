"""Base class of families with a UNet over latents: everything but the text encoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lit_prefopt.backbones.build_policy import build_policy
from lit_prefopt.backbones.build_process import build_process
from lit_prefopt.backbones.component_checks import check_tokenizer, check_unet, check_vae
from lit_prefopt.backbones.latent import VAEBackbone, full_config, upcast_vae_if_needed
from lit_prefopt.backbones.load_component import SINGLE_FILES, component_config, load_component
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.nf4 import quantize_nf4
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.single_file_components import open_components
from lit_prefopt.backbones.small_decoder import SmallDecoder
from lit_prefopt.batches import Prompt
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.marks import add_metadata, mark_metadata
from lit_prefopt.processes.variance_preserving import VariancePreserving
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora

DType = Literal["float32", "bfloat16", "float16"]


class UNetBackbone(VAEBackbone):
    """A UNet over the latents of a VAE; a family adds its text encoders.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        denoiser: UNet that training starts from: hub name, folder or .safetensors file of another
            UNet, or a .json configuration for random weights; the pipeline's UNet if not given.
        lora: Train a LoRA with these settings; all weights of the UNet if not given.
        reference: `initial` for the weights that training starts from (with LoRA the UNet without
            its adapter, else a frozen copy), `none`, or hub name, folder or file of another UNet.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        dtype: Precision of VAE and text encoders, and of the UNet below a LoRA.
        policy_dtype: Precision of a UNet whose weights are all trained, and of its frozen copy,
            since the two must agree exactly; a LoRA is always float32. bfloat16 needs half of the
            memory and an optimizer with stochastic rounding.
        nf4: Quantize the linear layers of transformer blocks below a LoRA to 4 bits.
        variant: Variant of the pipeline's files, such as `fp16`.
        vae: Hub name, folder or .safetensors file of another VAE.
        start_lora: A LoRA to start from, of diffusers, kohya, peft, ComfyUI or OneTrainer: it is
            merged into the UNet and the text encoders before training, for policy and reference.
        config: Hub name or folder of a pipeline with the architecture of a single file; by default
            diffusers' choice from the hub.
        prediction: Prediction type of the denoiser, if the checkpoint's scheduler is wrong. The
            marks of a single file (`v_pred`, `ztsnr`, or its metadata) are read without it.
        guidance: Guidance scale that conditions a guidance-distilled UNet in training.
        decoder: Hub name or folder of an AutoencoderTiny, such as madebyollin/taesd or
            madebyollin/taesdxl, to decode images for a judge during collection, not the VAE.
        channels_last: Store a pixel's channels contiguously, as GPUs' convolutions prefer.
        compile: Compile the UNet's repeated blocks (torch.compile), which takes a minute or two;
            policy and reference then agree up to rounding.
        encoders: Load VAE and text encoders. Training on `CachedPairs` needs neither: without them
            Stable Diffusion 1.x needs 0.41 GB less memory in bfloat16 and 0.83 GB less in float32,
            SDXL 1.8 and 3.6 GB. Nothing can be sampled, encoded or decoded then.
        zero_terminal_snr: Whether the noise schedule ends in pure noise, as that of most SDXL
            models with v prediction, if the checkpoint does not state it or is wrong.
    """

    PIPELINE: ClassVar[type[DiffusionPipeline]]
    """Stock pipeline of the family."""

    ENCODERS: ClassVar[dict[str, type[nn.Module]]]
    """Names and classes of the text encoders."""

    FILE_PREFIXES: ClassVar[dict[str, str]]
    """Components of a single file, and the prefix of the keys of each."""

    ADDITION: ClassVar[str | None] = None
    """Additional conditioning of the UNet (`addition_embed_type` of its configuration)."""

    EMPTY_IS_ZERO: ClassVar[bool] = False
    """Whether the empty prompt is embedded as zeros, if the pipeline's configuration is silent."""

    extra_conditioning: Callable[[Tensor, Tensor, dict[str, Any]], dict[str, Any]] | None = None
    """Function of latents, timesteps and conditioning that returns more of it (ControlNet)."""

    process: VariancePreserving

    PROCESS: ClassVar[type[VariancePreserving]] = DiscreteProcess
    """Class of the noise process."""

    def __init__(
        self,
        pretrained: str,
        denoiser: str | None = None,
        lora: LoRA | None = None,
        reference: str = "initial",
        gradient_checkpointing: bool = False,
        dtype: DType = "float32",
        variant: str | None = None,
        vae: str | None = None,
        start_lora: str | None = None,
        config: str | None = None,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
        guidance: float = 7.5,
        decoder: str | None = None,
        policy_dtype: Literal["float32", "bfloat16"] = "float32",
        nf4: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        encoders: bool = True,
        zero_terminal_snr: bool | None = None,
    ) -> None:
        frozen_dtype: torch.dtype = getattr(torch, dtype)
        unet_dtype = frozen_dtype if lora else getattr(torch, policy_dtype)
        parts = open_components(
            self.PIPELINE,
            pretrained,
            self.FILE_PREFIXES,
            [*self.ENCODERS] if encoders else [],
            variant=variant,
            config=config,
            vae=vae,
        )
        process = build_process(
            self.PROCESS, parts.scheduler(), pretrained, denoiser, prediction, zero_terminal_snr
        )
        unet = (
            load_component(
                UNet2DConditionModel, denoiser, "unet", unet_dtype, config=parts.unet_config
            )
            if denoiser
            else parts.unet(unet_dtype)
        )
        text_encoders: dict[str, Any] = {
            name: parts.text_encoder(name, kind, frozen_dtype)
            for name, kind in (self.ENCODERS if encoders else {}).items()
        }
        self._check_unet(unet, [*text_encoders.values()], denoiser or pretrained)
        if start_lora is not None:
            merge_lora(unet, [*text_encoders.values()], read_lora(start_lora))
        if nf4:
            quantize_nf4(unet, unet_dtype, lora)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        super().__init__(build_policy(unet, lora, reference), process)
        self.dtype, self.frozen_dtype = unet_dtype, frozen_dtype
        apply_memory_format_and_compile(
            self.policy.networks, channels_last=channels_last, compiled=compile
        )
        self.guidance, self.pretrained = guidance, pretrained
        self.vae, self.small_decoder = None, None
        if encoders:
            own_vae = (
                load_component(AutoencoderKL, vae, "vae", frozen_dtype, config=parts.vae_config)
                if vae
                else parts.vae(frozen_dtype)
            )
            self.vae = freeze(upcast_vae_if_needed(own_vae))
            self.vae_config = self.vae.config
            apply_memory_format_and_compile([self.vae], channels_last=channels_last, compiled=False)
        else:
            other = vae if vae and not vae.endswith(SINGLE_FILES) else None  # a file has none
            found = component_config(AutoencoderKL, other, "vae") if other else parts.vae_config()
            self.vae_config = full_config(found)
        check_vae(self.vae_config, vae or pretrained, self.latent_shape[0])
        if decoder is not None:
            small = SmallDecoder(
                decoder, frozen_dtype, self.latent_shape[0], self.pixels_per_latent
            )
            self.small_decoder = freeze(small)
        for name, encoder in text_encoders.items():
            setattr(self, name, freeze(encoder))
            tokenizer = name.replace("text_encoder", "tokenizer")
            setattr(self, tokenizer, parts.tokenizer(tokenizer))
            check_tokenizer(getattr(self, tokenizer), encoder.config.vocab_size, pretrained)
        self.empty_is_zero = parts.option("force_zeros_for_empty_prompt", self.EMPTY_IS_ZERO)

    def freeze(self) -> None:
        """Freeze all parameters and drop the reference, with the UNet in the precision `dtype`."""
        super().freeze()
        self.dtype = self.frozen_dtype
        self.policy.to(self.dtype)

    @abstractmethod
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts."""

    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the prediction of the active network, (B, C, H, W)."""
        kwargs, latents = self.denoiser_kwargs(prompt, latents), latents.to(self.dtype)
        if self.extra_conditioning is not None:
            kwargs |= self.extra_conditioning(latents, t, kwargs)
        return self.policy.net(latents, t, **kwargs).sample

    def fits_context(self, text: str) -> bool:
        """Whether a prompt fits the context of all text encoders."""
        names = (name.replace("text_encoder", "tokenizer") for name in self.ENCODERS)
        tokenizers = (getattr(self, name) for name in names)
        return all(len(t(text, verbose=False).input_ids) <= t.model_max_length for t in tokenizers)

    def denoiser_kwargs(self, prompt: Prompt, latents: Tensor) -> dict[str, Any]:
        """Return the UNet's conditioning keyword arguments.

        Args:
            prompt: B embedded prompts.
            latents: (B, C, H, W), for their number, size and device.
        """
        kwargs: dict[str, Any] = {"encoder_hidden_states": prompt.hidden.to(self.dtype)}
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

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """VAE and text encoders by name; empty if they are not loaded."""
        names = ["vae", *self.ENCODERS] if self.has_encoders else []
        return {name: getattr(self, name) for name in names}

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the UNet requires, by name."""
        config = self.policy.denoiser.config
        width = config.cross_attention_dim
        pooled = None
        if self.ADDITION is not None:
            whole = config.projection_class_embeddings_input_dim
            pooled = whole - 6 * config.addition_time_embed_dim
        return super().latent_settings() | {
            "scaling_factor": self.vae_config.scaling_factor,
            "prompt_width": width if isinstance(width, int) else width[0],
            "pooled_width": pooled,
        }

    def reference_settings(self) -> dict[str, Any]:
        """Return the settings that determine the reference's errors, by name."""
        kinds = {type(processor).__name__ for processor in self.policy.net.attn_processors.values()}
        own = {"dtype": str(self.dtype).removeprefix("torch."), "attention": sorted(kinds)}
        return super().reference_settings() | own

    @property
    def checkpoint(self) -> str:
        """Source of the weights, for messages."""
        return self.pretrained

    def save(self, folder: Path) -> Path:
        """Write a LoRA file for `load_lora_weights`, or a UNet for `from_pretrained`."""
        unet = self.policy.denoiser
        if not self.policy.adapter:
            unet.save_pretrained(folder / "unet")
            return folder / "unet"
        self.PIPELINE.save_lora_weights(
            folder,
            # peft's key names: diffusers drops half of a file that mixes them with older names
            unet_lora_layers=get_peft_model_state_dict(unet),
            **_collate_lora_metadata({"unet": unet}),
        )
        file = folder / "pytorch_lora_weights.safetensors"
        predicts_v = self.process.prediction == "v_prediction"
        add_metadata(file, mark_metadata(predicts_v, self.process.zero_terminal_snr))
        return file

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the checkpoint's native size."""
        config = self.policy.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def _check_unet(self, unet: UNet2DConditionModel, encoders: list[Any], source: str) -> None:
        check_unet(unet, encoders, source, type(self).__name__, self.ADDITION)

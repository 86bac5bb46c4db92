"""Base class of latent diffusion families: what does not depend on the kind of denoiser."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.training_utils import _collate_lora_metadata
from lightning.pytorch.utilities import rank_zero_info
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.backbones.build_policy import build_policy
from lit_prefopt.backbones.component_checks import check_tokenizer, check_vae
from lit_prefopt.backbones.load_component import SINGLE_FILES, component_config, load_component
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.nf4 import quantize_nf4
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.backbones.single_file_components import open_components
from lit_prefopt.backbones.small_decoder import SmallDecoder
from lit_prefopt.backbones.text_encoders import TextEncoder
from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Family
from lit_prefopt.processes.base import Process
from lit_prefopt.processes.marks import add_metadata
from lit_prefopt.weights.lora_files import WEIGHTS, read_lora
from lit_prefopt.weights.merge import merge_lora

DType = Literal["float32", "bfloat16", "float16"]

ProcessBuilder = Callable[[dict[str, Any], str, str | None], Process]
"""Function of a scheduler's configuration, of the checkpoint and of the denoiser's source."""


class LatentBackbone(Backbone):
    """A denoiser over the latents of a VAE, with text encoders.

    A subclass names its family and its text encoders, and defines `embed`, `predict` and the check
    of its denoiser.

    Args:
        pretrained: Hub name or folder of a complete pipeline in diffusers' layout, or a single
            .safetensors file in the layout of the original release.
        process: Builds the noise process.
        without: Names of text encoders that are not loaded.
        denoiser: Denoiser that training starts from: hub name, folder or .safetensors file of
            another UNet or transformer, or a .json configuration for random weights; the
            pipeline's own if not given.
        lora: Train a LoRA with these settings; all weights of the denoiser if not given.
        reference: `initial` for the weights that training starts from (with LoRA the denoiser
            without its adapter, else a frozen copy), `none`, or hub name, folder or file of another
            denoiser.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        dtype: Precision of VAE and text encoders, and of the denoiser below a LoRA.
        policy_dtype: Precision of a denoiser whose weights are all trained, and of its frozen copy,
            since the two must agree exactly; a LoRA is always float32. bfloat16 needs half of the
            memory and an optimizer with stochastic rounding.
        nf4: Quantize the linear layers of transformer blocks below a LoRA to 4 bits.
        variant: Variant of the pipeline's files, such as `fp16`.
        vae: Hub name, folder or .safetensors file of another VAE.
        start_lora: A LoRA to start from, of diffusers, kohya, peft, ComfyUI or OneTrainer: it is
            merged into the denoiser and the text encoders before training, for policy and
            reference.
        config: Hub name or folder of a pipeline with the architecture of a single file; by default
            diffusers' choice from the hub.
        decoder: Hub name or folder of an AutoencoderTiny, such as madebyollin/taesd or
            madebyollin/taesdxl, to decode images for a judge during collection, not the VAE.
        channels_last: Store a pixel's channels contiguously, as GPUs' convolutions prefer.
        compile: Compile the denoiser's repeated blocks (torch.compile), which takes a minute or
            two; policy and reference then agree up to rounding.
        encoders: Load VAE and text encoders. Training on `CachedPairs` needs neither: without them
            Stable Diffusion 1.x needs 0.41 GB less memory in bfloat16 and 0.83 GB less in float32,
            SDXL 1.8 and 3.6 GB. Nothing can be sampled, encoded or decoded then.
    """

    FAMILY: ClassVar[Family]
    """Components of the family's pipelines, and their names in files."""

    ENCODERS: ClassVar[dict[str, type[TextEncoder]]]
    """Kinds of the text encoders by their names in a pipeline."""

    LEFT_OUT_BY: ClassVar[dict[str, str]] = {}
    """Text encoders that a checkpoint may lack, and the option that leaves each out."""

    SHIFTED: ClassVar[bool] = False
    """Whether the family's VAEs shift their latents."""

    vae: Any  # Any: diffusers is untyped; None if not loaded
    vae_config: Any
    small_decoder: Any  # None if the VAE decodes everything

    def __init__(
        self,
        pretrained: str,
        process: ProcessBuilder,
        without: Collection[str] = (),
        denoiser: str | None = None,
        lora: LoRA | None = None,
        reference: str = "initial",
        gradient_checkpointing: bool = False,
        dtype: DType = "float32",
        variant: str | None = None,
        vae: str | None = None,
        start_lora: str | None = None,
        config: str | None = None,
        decoder: str | None = None,
        policy_dtype: Literal["float32", "bfloat16"] = "float32",
        nf4: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        encoders: bool = True,
    ) -> None:
        frozen_dtype: torch.dtype = getattr(torch, dtype)
        net_dtype = frozen_dtype if lora else getattr(torch, policy_dtype)
        part, source = self.FAMILY.denoiser, denoiser or pretrained
        names = [name for name in self.ENCODERS if encoders and name not in without]
        parts = open_components(
            self.FAMILY,
            pretrained,
            names,
            variant=variant,
            config=config,
            vae=vae,
        )
        left_out = {
            name for name in self.LEFT_OUT_BY if name in without or not parts.has_encoder(name)
        }
        noise = process(parts.scheduler(), pretrained, denoiser)
        net = (
            load_component(part.kind, denoiser, part.name, net_dtype, config=parts.denoiser_config)
            if denoiser
            else parts.denoiser(net_dtype)
        )
        texts = self._load_encoders(parts, [n for n in names if n not in left_out], frozen_dtype)
        networks = {name: text.network for name, text in texts.items()}
        self._check_denoiser(net, networks, source)
        if start_lora is not None:
            merge_lora(self.FAMILY, net, networks, read_lora(start_lora))
        if nf4:
            quantize_nf4(net, net_dtype, lora)
        if gradient_checkpointing:
            net.enable_gradient_checkpointing()
        super().__init__(build_policy(net, lora, reference, self.FAMILY), noise)
        self.dtype, self.frozen_dtype, self.pretrained = net_dtype, frozen_dtype, pretrained
        apply_memory_format_and_compile(
            self.policy.networks, channels_last=channels_last, compiled=compile
        )
        self._load_vae(parts, vae, load=encoders, channels_last=channels_last)
        self.small_decoder = None
        if decoder is not None:
            small = SmallDecoder(
                decoder, frozen_dtype, self.latent_shape[0], self.pixels_per_latent
            )
            self.small_decoder = freeze(small)
        self.texts, self.left_out = texts, left_out
        if lacking := sorted(left_out - {*without}):
            rank_zero_info(
                f"{pretrained} has no {' and no '.join(lacking)}: prompts are embedded without it."
            )
        for name, text in texts.items():
            setattr(self, name, freeze(text.network))
            setattr(self, name.replace("text_encoder", "tokenizer"), text.tokenizer)
        self._read_options(parts)

    def freeze(self) -> None:
        """Freeze all parameters and drop the reference, with the denoiser in precision `dtype`."""
        super().freeze()
        self.dtype = self.frozen_dtype
        self.policy.to(self.dtype)

    def fits_context(self, text: str) -> bool:
        """Whether a prompt fits the context of all text encoders."""
        return all(encoder.fits_context(text) for encoder in self.texts.values())

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """VAE and text encoders by name; empty if they are not loaded."""
        names = ["vae", *self.texts] if self.has_encoders else []
        return {name: getattr(self, name) for name in names}

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
        """Write a LoRA file for `load_lora_weights`, or a denoiser for `from_pretrained`."""
        net, name = self.policy.denoiser, self.FAMILY.denoiser.name
        if not self.policy.adapter:
            net.save_pretrained(folder / name)
            return folder / name
        self.FAMILY.pipeline.save_lora_weights(
            folder,
            # peft's key names: diffusers drops half of a file that mixes them with older names
            **{f"{name}_lora_layers": get_peft_model_state_dict(net)},
            **_collate_lora_metadata({name: net}),
        )
        add_metadata(folder / WEIGHTS, self._marks())
        return folder / WEIGHTS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the checkpoint's native size."""
        config = self.policy.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def has_encoders(self) -> bool:
        """Whether VAE and text encoders are loaded."""
        return self.vae is not None

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision of the VAE's latents."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to mean and deviation, in the VAE's precision and scale."""
        self.require_encoders("A run on images")
        height, width = images.shape[-2:]
        if not self.has_size(height, width):
            raise InputError(
                f"The backbone cannot encode images of {width} x {height} pixels: set "
                f"`--data.resolution` to {self.sizes}."
            )
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def scaled(self, means: Tensor) -> Tensor:
        """Shift and scale means as the denoiser expects latents, float32."""
        shift = self.vae_config.shift_factor
        shifted = means.float() if shift is None else means.float() - shift
        return shifted * self.vae_config.scaling_factor

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations as those of the denoiser's latents, float32."""
        return deviations.float() * self.vae_config.scaling_factor

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to mean and deviation of the scaled latents, float32."""
        mean, deviation = self.posterior(images)
        return self.scaled(mean), self.scaled_deviation(deviation)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32."""
        self.require_encoders("Decoding latents")
        own, shift = latents / self.vae_config.scaling_factor, self.vae_config.shift_factor
        own = (own if shift is None else own + shift).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(own).sample.float().clamp(-1, 1)

    def preview(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32, with the small decoder if there is one."""
        return self.decode(latents) if self.small_decoder is None else self.small_decoder(latents)

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the denoiser requires, by name."""
        return super().latent_settings() | {
            "scaling_factor": self.vae_config.scaling_factor,
            "shift_factor": self.vae_config.shift_factor,
        }

    @property
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, along each side."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    def _load_encoders(
        self, parts: Components, names: list[str], dtype: torch.dtype
    ) -> dict[str, TextEncoder]:
        """Load text encoders with their tokenizers; one that the checkpoint may lack is no error.

        Args:
            parts: The checkpoint's components.
            names: Names of the text encoders.
            dtype: Precision of their weights.
        """
        texts = {}
        for name in names:
            optional = self.LEFT_OUT_BY.get(name)
            kind, tokenizer = self.ENCODERS[name], name.replace("text_encoder", "tokenizer")
            try:
                texts[name] = kind(
                    parts.text_encoder(name, dtype), parts.tokenizer(tokenizer, kind.TOKENIZER)
                )
            except InputError as error:
                if optional is None:
                    raise
                raise InputError(
                    f"{str(error).rstrip('.')}, or set `{optional}` to embed prompts without it."
                ) from error
            check_tokenizer(
                texts[name].tokenizer, texts[name].network.config.vocab_size, parts.pretrained
            )
        return texts

    def _load_vae(
        self, parts: Components, source: str | None, load: bool, channels_last: bool
    ) -> None:
        """Load the VAE, or only its configuration.

        Args:
            parts: The checkpoint's components.
            source: Hub name, folder or file of another VAE.
            load: Whether the weights are needed.
            channels_last: Whether a pixel's channels are stored contiguously.
        """
        kind = self.FAMILY.vae.kind
        self.vae = None
        if load:
            own = (
                load_component(kind, source, "vae", self.frozen_dtype, config=parts.vae_config)
                if source
                else parts.vae(self.frozen_dtype)
            )
            self.vae = freeze(upcast_vae_if_needed(own))
            self.vae_config = self.vae.config
            apply_memory_format_and_compile([self.vae], channels_last=channels_last, compiled=False)
        else:
            other = source if source and not source.endswith(SINGLE_FILES) else None
            found = component_config(kind, other, "vae") if other else parts.vae_config()
            self.vae_config = full_config(kind, found)
        check_vae(
            self.vae_config, source or self.pretrained, self.latent_shape[0], shift=self.SHIFTED
        )

    def _marks(self) -> dict[str, str]:
        """Return metadata of the family's LoRA files."""
        return {}

    def _read_options(self, parts: Components) -> None:
        """Read further options of the checkpoint, such as those of its pipeline."""

    @abstractmethod
    def _check_denoiser(self, net: Any, encoders: dict[str, Any], source: str) -> None:
        """Check that a denoiser belongs to the family and fits the text encoders.

        Args:
            net: The denoiser.
            encoders: The text encoders' networks by name; empty if they are not loaded.
            source: Hub name, folder or file of the denoiser, for messages.
        """


def upcast_vae_if_needed(vae: Any) -> Any:
    """Return the VAE in float32 if its configuration says that it overflows in float16."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    return vae.float() if overflows else vae


def full_config(kind: Any, config: dict[str, Any]) -> Any:
    """Return the configuration of a VAE with the defaults of its class, without weights."""
    with torch.device("meta"):
        return kind.from_config(config).config

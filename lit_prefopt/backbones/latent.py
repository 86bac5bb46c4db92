"""Base class of latent diffusion families: what does not depend on the kind of denoiser."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import _collate_lora_metadata
from lightning.pytorch.utilities import rank_zero_info
from peft.utils import get_peft_model_state_dict
from torch import nn

from lit_prefopt.backbones.build_policy import build_policy
from lit_prefopt.backbones.component_checks import check_tokenizer
from lit_prefopt.backbones.loading import Components
from lit_prefopt.backbones.lora import LoRA
from lit_prefopt.backbones.memory_format import apply_memory_format_and_compile
from lit_prefopt.backbones.policy import Policy, freeze
from lit_prefopt.backbones.quantization import Quantization, quantize
from lit_prefopt.backbones.single_file_components import open_components
from lit_prefopt.backbones.start_weights import StartWeights, load_denoiser
from lit_prefopt.backbones.text_encoders import TextEncoder
from lit_prefopt.backbones.vae import VAEBackbone
from lit_prefopt.backbones.without_weights import WithoutWeights
from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Process
from lit_prefopt.processes.marks import add_metadata
from lit_prefopt.weights.lora_files import WEIGHTS, read_lora
from lit_prefopt.weights.merge import merge_lora

DType = Literal["float32", "bfloat16", "float16"]

ProcessBuilder = Callable[[dict[str, Any], str, str | None], Process]
"""Function of a scheduler's configuration, of the checkpoint and of the denoiser's source."""


class LatentBackbone(VAEBackbone):
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
        gradient_checkpointing: Recompute activations in the backward pass to save memory; `auto`
            does so if a `fit` would not fit the device without it.
        dtype: Precision of VAE and text encoders, and of the denoiser below a LoRA.
        policy_dtype: Precision of a denoiser whose weights are all trained, and of its frozen copy,
            since the two must agree exactly; a LoRA is always float32. bfloat16 needs half of the
            memory and an optimizer with stochastic rounding.
        quantization: Quantize the linear layers of transformer blocks below a LoRA: `nf4` to 4 bits
            (needs bitsandbytes), `int8` to 8 bits, whose error is about a twelfth.
        variant: Variant of the pipeline's files, such as `fp16`.
        vae: Hub name, folder or .safetensors file of another VAE.
        start_lora: A LoRA to start from, of diffusers, kohya, peft, ComfyUI or OneTrainer: it is
            merged into the denoiser and the text encoders before training, for policy and
            reference.
        training_adapter: A LoRA that is merged into the denoiser, for policy and reference, while
            a LoRA is trained, and is left out of what `export` and `evaluate` load: such as one
            that undoes the distillation of a few-step model during training. Sample grids of the
            run show the model with it.
        config: Hub name or folder of a pipeline with the architecture of a single file; by default
            diffusers' choice from the hub.
        decoder: Hub name or folder of an AutoencoderTiny, such as madebyollin/taesd,
            madebyollin/taesdxl or madebyollin/taesd3, to decode images for a judge during
            collection, not the VAE.
        channels_last: Store a pixel's channels contiguously, as GPUs' convolutions prefer.
        compile: Compile the denoiser's repeated blocks (torch.compile), which takes a minute or
            two; policy and reference then agree up to rounding.
        encoders: Load VAE and text encoders. Training on `CachedPairs` needs neither: without them
            Stable Diffusion 1.x needs 0.41 GB less memory in bfloat16 and 0.83 GB less in float32,
            SDXL 1.8 and 3.6 GB. Nothing can be sampled, encoded or decoded then.
        denoiser_weights: Load the denoiser's weights. `LatentCache` needs only its configuration.
    """

    ENCODERS: ClassVar[dict[str, type[TextEncoder]]]
    """Kinds of the text encoders by their names in a pipeline."""

    LEFT_OUT_BY: ClassVar[dict[str, str]] = {}
    """Text encoders that a checkpoint may lack, and the option that leaves each out."""

    def __init__(
        self,
        pretrained: str,
        process: ProcessBuilder,
        without: Collection[str] = (),
        denoiser: str | None = None,
        lora: LoRA | None = None,
        reference: str = "initial",
        gradient_checkpointing: bool | Literal["auto"] = False,
        dtype: DType = "float32",
        variant: str | None = None,
        vae: str | None = None,
        start_lora: str | None = None,
        training_adapter: str | None = None,
        config: str | None = None,
        decoder: str | None = None,
        policy_dtype: Literal["float32", "bfloat16"] = "float32",
        quantization: Quantization | None = None,
        channels_last: bool = False,
        compile: bool = False,
        encoders: bool = True,
        denoiser_weights: bool = True,
    ) -> None:
        frozen_dtype: torch.dtype = getattr(torch, dtype)
        net_dtype = frozen_dtype if lora else getattr(torch, policy_dtype)
        part, source = self.FAMILY.denoiser, denoiser or pretrained
        if needed := sorted({*without} - {*self.LEFT_OUT_BY}):
            raise InputError(
                f"{type(self).__name__} cannot embed prompts without {' and '.join(needed)}: leave "
                "`--backbone.without` out; `--backbone.encoders false` leaves out all encoders, "
                "for a training on cached pairs."
            )
        names = [name for name in self.ENCODERS if encoders and name not in without]
        parts = open_components(
            self.FAMILY,
            pretrained,
            names,
            variant=variant,
            config=config,
            vae=vae,
        )
        if denoiser is None:
            self._check_checkpoint(parts)
        left_out = {
            name for name in self.LEFT_OUT_BY if name in without or not parts.has_encoder(name)
        }
        noise = process(parts.scheduler(), pretrained, denoiser)
        if not denoiser_weights:
            net: Any = WithoutWeights(part.kind, parts.denoiser_config())
            training_adapter = None
            quantization, gradient_checkpointing, compile = None, False, False
        else:
            net = load_denoiser(parts, denoiser, net_dtype)
        texts = self._load_encoders(parts, [n for n in names if n not in left_out], frozen_dtype)
        networks = {name: text.network for name, text in texts.items()}
        self._check_denoiser(net, networks, source)
        if start_lora is not None:
            start = read_lora(start_lora)
            start = start if denoiser_weights else start.without_denoiser()
            merge_lora(self.FAMILY, net, networks, start)
        if training_adapter is not None:
            if lora is None:
                raise InputError(
                    "All weights of the denoiser are trained, which would contain the "
                    "`training_adapter`: train a LoRA (`--backbone.lora.rank 16`), or leave the "
                    "adapter out."
                )
            merge_lora(self.FAMILY, net, {}, read_lora(training_adapter))
        if quantization is not None:
            quantize(net, quantization, net_dtype, lora)
        policy = (
            build_policy(net, lora, reference, self.FAMILY, gradient_checkpointing)
            if denoiser_weights
            else Policy(net, None)
        )
        super().__init__(policy, noise)
        source_of = (self.FAMILY, pretrained, denoiser, net_dtype, start_lora, variant, config)
        self.start = StartWeights(*source_of, channels_last) if denoiser_weights else None
        self.dtype, self.frozen_dtype, self.pretrained = net_dtype, frozen_dtype, pretrained
        apply_memory_format_and_compile(
            self.policy.networks, channels_last=channels_last, compiled=compile
        )
        self._load_vae(parts, vae, decoder, load=encoders, channels_last=channels_last)
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

    @property
    def has_denoiser(self) -> bool:
        """Whether the denoiser's weights are loaded."""
        return not isinstance(self.policy.denoiser, WithoutWeights)

    def reference_settings(self) -> dict[str, Any]:
        """Return the settings that determine the reference's errors, by name."""
        # not every model of diffusers has `attn_processors`
        attentions = (Attention, AttentionModuleMixin)
        modules = [part for part in self.policy.net.modules() if isinstance(part, attentions)]
        kinds = {type(module.processor).__name__ for module in modules}
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
        size = config.get("sample_size") or self.FAMILY.native // self.pixels_per_latent
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels // self.FAMILY.packed, height, width

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
                    f"{str(error).rstrip('.')}, or embed prompts without it: `{optional}` in a "
                    f"recipe, or [null, null] for {name} and {tokenizer} in model_index.json."
                ) from error
            check_tokenizer(
                texts[name].tokenizer,
                texts[name].network.config.get_text_config().vocab_size,
                parts.pretrained,
            )
        return texts

    def _marks(self) -> dict[str, str]:
        """Return metadata of the family's LoRA files."""
        return {}

    def _check_checkpoint(self, parts: Components) -> None:
        """Check the checkpoint's configurations, before any weight is loaded."""

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

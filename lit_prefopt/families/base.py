"""A model family: components of its pipelines, names of their weights, and metadata of its files.

Only names stand here: nothing imports torch or diffusers before a class or a tensor is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Config = Mapping[str, Any]

Scale = Literal["factor", "shift", "channel", "batch-norm"]


class Entry(NamedTuple):
    """Key of a parameter in a file, and how the file stores it."""

    key: str
    piece: int | None = None  # its number in a fused layer, such as one of query, key and value
    transposed: bool = False
    swapped: bool = False  # scale and shift of an adaptive norm, in the other order
    conv: bool = False  # a linear layer that the file stores as a 1 x 1 convolution


Layout = dict[str, Entry]
"""A file's entries by the parameters of the network."""


@dataclass(frozen=True)
class Component:
    """A network of a pipeline.

    Args:
        name: Its name and its folder in diffusers' layout, such as `unet` or `text_encoder_2`.
        class_name: Its class.
        prefixes: Beginnings of its keys in .safetensors files, a whole checkpoint's first.
        layouts: Function that yields the layouts in which files store its parameters, given their
            names; the original release's first, without prefix.
        package: Package of its class.
        optional: Whether a pipeline may lack it.
        identity: Parameters that are the identity where a file lacks them.
        ignored: Tensors of original files that no output depends on and diffusers leaves out.
        kohya: Beginning of its layer names in kohya's LoRA files.
        comfyui: Beginning of its layer names in ComfyUI's LoRA files.
        guidance: Setting of the width of an embedding of the guidance scale, and the name of its
            weight, in a denoiser that a distillation may have given one.
        roles: Names under which `read_lora` stores its layers; by default its own.
    """

    name: str
    class_name: str
    prefixes: tuple[str, ...]
    layouts: Callable[[Sequence[str]], Iterator[Layout]]
    package: Literal["diffusers", "transformers"] = "diffusers"
    optional: bool = False
    identity: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kohya: str = ""
    comfyui: str = ""
    guidance: tuple[str, str] | None = None
    roles: tuple[str, ...] = ()

    @property
    def kind(self) -> Any:
        """Class of the network; imports its package."""
        return getattr(importlib.import_module(self.package), self.class_name)

    @property
    def lora_roles(self) -> tuple[str, ...]:
        """Names under which `read_lora` stores its layers."""
        return self.roles or (self.name,)

    def guidance_width(self, config: Config) -> int | None:
        """Return the width of a denoiser's embedding of the guidance scale; None without one.

        Args:
            config: The denoiser's configuration.
        """
        return None if self.guidance is None else config.get(self.guidance[0])

    def stored_guidance(self, weights: Mapping[str, Any]) -> dict[str, int]:
        """Return the setting of the embedding of the guidance scale that weights have, by name.

        Args:
            weights: Tensors of the denoiser by name.
        """
        if self.guidance is None or self.guidance[1] not in weights:
            return {}
        return {self.guidance[0]: weights[self.guidance[1]].shape[1]}

    def original(self, parameters: Sequence[str]) -> Layout:
        """Return the layout of the original release, without prefix.

        Args:
            parameters: Names of all parameters of the network.
        """
        return next(iter(self.layouts(parameters)))


@dataclass(frozen=True)
class Family:
    """A model family, and all that depends on it outside its backbone.

    Args:
        name: Its short name, such as `sdxl`.
        title: Its name in messages.
        pipelines: Classes of stock pipelines that have these components, the usual one first.
        denoiser: UNet or transformer.
        vae: The VAE.
        encoders: Text encoders, in the pipeline's order.
        backbone: Class of `lit_prefopt.backbones` that trains it.
        noise: Its noise process: discrete diffusion (`ddpm`) or rectified flow (`flow`).
        scale: What makes the denoiser's latents of the VAE's: a `factor`, `shift` and factor, mean
            and deviation of each `channel`, or the statistics of a `batch-norm`.
        packed: Channels of the denoiser's input for each of the VAE's latents: 4 where a token is a
            square of 2 x 2 latents.
        native: Side of its images in pixels, if the denoiser's configuration does not state it.
        compared: Settings of the denoiser's configuration that must agree with the base's.
        architecture: Name in Stability AI's model specification, given the denoiser's
            configuration and whether it predicts v.
        kohya_version: kohya's `ss_base_model_version`, given the same.
        kohya_module: kohya's `ss_network_module`.
        kohya_v2: kohya's `ss_v2`.
        kohya_original: Whether kohya's layer names of the denoiser are the original ones.
        comfyui_original: Whether ComfyUI's LoRA files have the original layer names.
        comfyui_halves: Names of the two matrices of a layer in ComfyUI's LoRA files.
        one_alpha: Whether kohya's files are written with one alpha for all layers, since diffusers
            0.42 ignores an attention layer's alpha that differs from the most common one.
        unread: Beginnings of the names of the denoiser's layers that diffusers 0.42 does not read
            of a LoRA file, by layout; an empty one where it reads no layer of such a file.
        refused: Beginnings of the names of the denoiser's layers with which diffusers 0.42 refuses
            a whole file of kohya's or ComfyUI's layout.
        stated: Regular expressions of the names that metadata of LoRAs have for models of the
            family (lower-case letters and digits alone), with the title of each.
        model: Title of the model among these, given the denoiser's configuration; empty if it is
            not known. By default the family's title.
        is_own: Whether a pipeline of these classes is of this family, given the configuration of
            its first text encoder, where several families share a class.
        distilled_pipeline: Class of pipelines whose denoiser is conditioned on the guidance scale.
        distilled_backbone: Class of `lit_prefopt.backbones` for such a denoiser.
        whole_files: Whether single files of the family contain VAE and text encoders; other files
            take them from the pipeline of the same architecture.
        lora_targets: Layers of the denoiser that a LoRA adapts by default; empty for those of a
            UNet.
        unused: Beginnings of the names of layers that no prediction depends on, given the
            denoiser's configuration: they are neither trained nor adapted, since DDP fails on
            parameters without a gradient.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    denoiser: Component
    vae: Component
    encoders: tuple[Component, ...]
    backbone: str
    architecture: Callable[[Config, bool], str]
    kohya_version: Callable[[Config, bool], str]
    noise: Literal["ddpm", "flow"] = "ddpm"
    scale: Scale = "factor"
    packed: int = 1
    native: int = 1024
    compared: tuple[str, ...] = ()
    kohya_module: str = "networks.lora"
    kohya_v2: bool = False
    kohya_original: bool = True
    comfyui_original: bool = True
    comfyui_halves: tuple[str, str] = ("lora_A", "lora_B")
    one_alpha: bool = True
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    stated: Mapping[str, str] = field(default_factory=dict)
    model: Callable[[Config], str] | None = None
    is_own: Callable[[Config], bool] = field(default=lambda config: True)
    distilled_pipeline: str | None = None
    distilled_backbone: str | None = None
    whole_files: bool = True
    lora_targets: tuple[str, ...] = ()
    unused: Callable[[Config], tuple[str, ...]] = field(default=lambda config: ())

    def model_title(self, config: Config) -> str:
        """Return the title of a model, as in `stated`; empty if it is not known.

        Args:
            config: The denoiser's configuration.
        """
        return self.title if self.model is None else self.model(config)

    @property
    def components(self) -> dict[str, Component]:
        """Denoiser, VAE and text encoders by name."""
        return {part.name: part for part in (self.denoiser, self.vae, *self.encoders)}

    @property
    def file_prefixes(self) -> dict[str, str]:
        """Prefix of each component's keys in a single file that must have the component."""
        return {
            name: part.prefixes[0] for name, part in self.components.items() if not part.optional
        }

    @property
    def pipeline(self) -> Any:
        """Class of the stock pipeline; imports diffusers."""
        return getattr(importlib.import_module("diffusers"), self.pipelines[0])

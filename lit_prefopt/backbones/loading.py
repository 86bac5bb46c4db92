"""Load the components of a model, from the hub or a folder in diffusers' layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from lit_prefopt.backbones.load_component import (
    component_config,
    component_errors,
    from_folder,
    load_component,
)
from lit_prefopt.errors import InputError
from lit_prefopt.weights.hub import check_reachable


class Components(ABC):
    """The components of a stock diffusers pipeline, loaded one by one.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: Source of the components.
    """

    def __init__(self, pipeline: type[DiffusionPipeline], pretrained: str) -> None:
        self.pipeline, self.pretrained = pipeline, pretrained

    @abstractmethod
    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration."""

    @abstractmethod
    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline, such as `force_zeros_for_empty_prompt`."""

    @abstractmethod
    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet."""

    @abstractmethod
    def unet_config(self) -> dict[str, Any]:
        """Load the UNet's configuration without its weights."""

    @property
    @abstractmethod
    def has_vae(self) -> bool:
        """Whether the source contains a VAE; False for one on the hub, which is not searched."""

    @abstractmethod
    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Load the VAE."""

    @abstractmethod
    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration without its weights."""

    @abstractmethod
    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name and a transformers class."""

    @abstractmethod
    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer of a name."""


class FolderComponents(Components):
    """Components in diffusers' layout, from the hub or a local folder.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: Hub name or folder.
        needed: Names of the components that the folder must have.
        variant: Variant of the files, such as `fp16`.
    """

    def __init__(
        self,
        pipeline: type[DiffusionPipeline],
        pretrained: str,
        needed: list[str],
        variant: str | None = None,
    ) -> None:
        super().__init__(pipeline, pretrained)
        self.variant = variant
        check_family(pipeline, pretrained)
        if Path(pretrained).is_dir():
            missing = [name for name in needed if not (Path(pretrained) / name).is_dir()]
            if missing:
                raise InputError(
                    f"{pretrained} has no {' and no '.join(missing)}: name the folder of a full "
                    f"pipeline ({pipeline.__name__}); a UNet or a VAE alone goes to "
                    "`--backbone.denoiser` or `--backbone.vae`."
                )

    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration, the first component to be loaded."""
        try:
            return DDPMScheduler.load_config(self.pretrained, subfolder="scheduler")
        except OSError as error:
            raise InputError(
                f"{self.pretrained} is neither a local folder in diffusers' layout nor a name that "
                "the hub can deliver now: check the spelling, the connection, and access to gated "
                "models."
            ) from error

    def option(self, name: str, default: Any) -> Any:
        """Return an option from the pipeline's model_index.json."""
        return _pipeline_config(self.pipeline, self.pretrained).get(name, default)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet."""
        return load_component(UNet2DConditionModel, self.pretrained, "unet", dtype, self.variant)

    def unet_config(self) -> dict[str, Any]:
        """Load the UNet's configuration."""
        return component_config(UNet2DConditionModel, self.pretrained, "unet")

    @property
    def has_vae(self) -> bool:
        """Whether a local folder contains a VAE."""
        return (Path(self.pretrained) / "vae").is_dir()

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Load the VAE."""
        return load_component(AutoencoderKL, self.pretrained, "vae", dtype, self.variant)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration."""
        return component_config(AutoencoderKL, self.pretrained, "vae")

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        return from_folder(
            kind,
            self.pretrained,
            name,
            name,
            self.variant,
            dtype=dtype,
            trust_remote_code=False,
        )

    def text_config(self, name: str, kind: Any) -> Any:
        """Load the configuration of a text encoder."""
        with component_errors(self.pretrained, name):
            return kind.config_class.from_pretrained(
                self.pretrained, subfolder=name, trust_remote_code=False
            )

    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer of a name."""
        with component_errors(self.pretrained, name):
            return CLIPTokenizer.from_pretrained(
                self.pretrained, subfolder=name, trust_remote_code=False
            )


def check_family(pipeline: type[DiffusionPipeline], source: str) -> None:
    """Check that a pipeline belongs to a family, if its configuration names one."""
    check_reachable(source)
    stated = _pipeline_config(pipeline, source).get("_class_name")
    image_to_image = pipeline.__name__.replace("Pipeline", "Img2ImgPipeline")
    if stated not in (None, pipeline.__name__, image_to_image, *_SAME_PARTS):
        raise InputError(
            f"{source} is a {stated} and not a {pipeline.__name__}: take the backbone of its "
            "family, or name a checkpoint of this one."
        )


_SAME_PARTS = ("LatentConsistencyModelPipeline",)
"""Pipelines that differ from their family's pipeline only in sampling."""


def _pipeline_config(pipeline: type[DiffusionPipeline], source: str) -> dict[str, Any]:
    try:
        return dict(pipeline.load_config(source))
    except OSError:  # a model_index.json is optional
        return {}

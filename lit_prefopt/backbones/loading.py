"""Load the components of a model, from the hub or a folder in diffusers' layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import nn

from lit_prefopt.backbones.load_component import (
    component_config,
    component_errors,
    from_folder,
    load_component,
)
from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component, Family
from lit_prefopt.weights.checks import first_line
from lit_prefopt.weights.hub import check_reachable


class Components(ABC):
    """The components of a stock diffusers pipeline, loaded one by one.

    Args:
        family: The pipeline's family.
        pretrained: Source of the components.
    """

    def __init__(self, family: Family, pretrained: str) -> None:
        self.family, self.pretrained = family, pretrained

    @abstractmethod
    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration."""

    @abstractmethod
    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline, such as `force_zeros_for_empty_prompt`."""

    @abstractmethod
    def denoiser(self, dtype: torch.dtype) -> Any:
        """Load the denoiser."""

    @abstractmethod
    def denoiser_config(self) -> dict[str, Any]:
        """Load the denoiser's configuration without its weights."""

    @property
    @abstractmethod
    def has_vae(self) -> bool:
        """Whether the source contains a VAE; False for one on the hub, which is not searched."""

    @abstractmethod
    def vae(self, dtype: torch.dtype) -> Any:
        """Load the VAE."""

    @abstractmethod
    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration without its weights."""

    @abstractmethod
    def has_encoder(self, name: str) -> bool:
        """Whether the source has a text encoder that its family may lack."""

    @abstractmethod
    def text_encoder(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""

    @abstractmethod
    def tokenizer(self, name: str, kind: Any) -> Any:
        """Load the tokenizer of a name and a transformers class."""


class FolderComponents(Components):
    """Components in diffusers' layout, from the hub or a local folder.

    Args:
        family: The pipeline's family.
        pretrained: Hub name or folder.
        needed: Names of the components that the folder must have, unless the family may lack them.
        variant: Variant of the files, such as `fp16`.
    """

    def __init__(
        self, family: Family, pretrained: str, needed: list[str], variant: str | None = None
    ) -> None:
        super().__init__(family, pretrained)
        self.variant = variant
        check_family(family, pretrained)
        optional = {part.name for part in family.encoders if part.optional}
        missing = [
            name
            for name in needed
            if self.lacks(name) and name.replace("tokenizer", "text_encoder") not in optional
        ]
        if missing:
            raise InputError(
                f"{pretrained} has no {' and no '.join(missing)}: name the folder of a full "
                f"pipeline ({family.pipelines[0]}); a denoiser or a VAE alone goes "
                "to `--backbone.denoiser` or `--backbone.vae`."
            )

    def lacks(self, name: str) -> bool:
        """Whether the source is a local folder without a component's folder."""
        folder = Path(self.pretrained)
        return folder.is_dir() and not (folder / name).is_dir()

    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration, the first component to be loaded."""
        file = Path(self.pretrained) / "scheduler" / SCHEDULER_CONFIG_NAME
        try:
            config = DDPMScheduler.load_config(self.pretrained, subfolder="scheduler")
            if isinstance(config, dict):
                return config
            raise InputError(f"{file} is not a mapping of fields: copy it again.")
        except OSError as error:
            if file.is_file():
                raise InputError(
                    f"{file} cannot be read ({first_line(error)}): copy it again."
                ) from error
            raise InputError(
                f"{self.pretrained} is neither a local folder in diffusers' layout nor a name that "
                "the hub can deliver now: check the spelling, the connection, and access to gated "
                "models."
            ) from error

    def option(self, name: str, default: Any) -> Any:
        """Return an option from the pipeline's model_index.json."""
        return _pipeline_config(self.family, self.pretrained).get(name, default)

    def denoiser(self, dtype: torch.dtype) -> Any:
        """Load the denoiser."""
        return self._component(self.family.denoiser, dtype)

    def denoiser_config(self) -> dict[str, Any]:
        """Load the denoiser's configuration."""
        return self._config(self.family.denoiser)

    @property
    def has_vae(self) -> bool:
        """Whether a local folder contains a VAE."""
        return (Path(self.pretrained) / "vae").is_dir()

    def vae(self, dtype: torch.dtype) -> Any:
        """Load the VAE."""
        return self._component(self.family.vae, dtype)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration."""
        return self._config(self.family.vae)

    def has_encoder(self, name: str) -> bool:
        """Whether the pipeline's model_index.json does not leave a text encoder out."""
        return self.option(name, ("", "")) != [None, None]

    def text_encoder(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        return from_folder(
            self.family.components[name].kind,
            self.pretrained,
            name,
            name,
            self.variant,
            dtype=dtype,
            trust_remote_code=False,
        )

    def text_config(self, name: str) -> Any:
        """Load the configuration of a text encoder."""
        kind = self.family.components[name].kind
        with component_errors(self.pretrained, name):
            return kind.config_class.from_pretrained(
                self.pretrained, subfolder=name, trust_remote_code=False
            )

    def tokenizer(self, name: str, kind: Any) -> Any:
        """Load the tokenizer of a name and a transformers class."""
        with component_errors(self.pretrained, name):
            return kind.from_pretrained(self.pretrained, subfolder=name, trust_remote_code=False)

    def _component(self, part: Component, dtype: torch.dtype) -> Any:
        return load_component(part.kind, self.pretrained, part.name, dtype, self.variant)

    def _config(self, part: Component) -> dict[str, Any]:
        return component_config(part.kind, self.pretrained, part.name)


def check_family(family: Family, source: str) -> None:
    """Check that a pipeline belongs to a family, if its configuration names one."""
    check_reachable(source)
    stated = _pipeline_config(family, source).get("_class_name")
    if stated not in (None, *family.pipelines):
        raise InputError(
            f"{source} is a {stated} and not a {family.pipelines[0]}: take the backbone of its "
            "family, or name a checkpoint of this one."
        )


def _pipeline_config(family: Family, source: str) -> dict[str, Any]:
    try:
        return dict(family.pipeline.load_config(source))
    except OSError:  # a model_index.json is optional
        return {}

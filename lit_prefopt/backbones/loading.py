"""Load the components of a model from the hub, a diffusers folder, or a single file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTokenizer

from lit_prefopt.backbones.component_checks import check_class
from lit_prefopt.configs import find_config
from lit_prefopt.errors import InputError


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

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Load the VAE."""
        return load_component(AutoencoderKL, self.pretrained, "vae", dtype, self.variant)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration."""
        return component_config(AutoencoderKL, self.pretrained, "vae")

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        with _loading(self.pretrained, name):
            return kind.from_pretrained(  # type: ignore[attr-defined]
                self.pretrained, subfolder=name, dtype=dtype, variant=self.variant
            )

    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer of a name."""
        with _loading(self.pretrained, name):
            return CLIPTokenizer.from_pretrained(self.pretrained, subfolder=name)


class SingleFileComponents(Components):
    """Components from one .safetensors file in the layout of the original release.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: The file.
        prefixes: The file's components, and the prefix of the keys of each.
        dtype: The highest precision of any component.
        config: Hub name or folder of a pipeline of the same architecture; by default diffusers'
            choice from the hub for such a file.
        passed: Components from other sources.
    """

    def __init__(
        self,
        pipeline: type[DiffusionPipeline],
        pretrained: str,
        prefixes: dict[str, str],
        dtype: torch.dtype,
        config: str | None = None,
        passed: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(pipeline, pretrained)
        self.dtype, self.config, self.passed = dtype, config, passed or {}
        if config is not None:
            check_family(pipeline, config)
        keys = _keys(pretrained)
        missing = [
            name
            for name, prefix in prefixes.items()
            if name not in self.passed and not any(key.startswith(prefix) for key in keys)
        ]
        if missing:
            raise InputError(
                f"{pretrained} has no {' and no '.join(missing)} where {pipeline.__name__} has "
                "it: name a checkpoint of that family, or take the backbone of the file's family."
            )

    @cached_property
    def _loaded(self) -> DiffusionPipeline:
        try:
            return self.pipeline.from_single_file(
                self.pretrained,
                config=self.config,
                torch_dtype=self.dtype,
                safety_checker=None,
                **self.passed,
            )
        except OSError as error:  # what the hub's client raises without a connection
            raise InputError(
                f"{self.pretrained} does not name its architecture, and the hub cannot be reached: "
                "give the folder of a pipeline of the same architecture as `--backbone.config "
                "FOLDER`."
            ) from error
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.pretrained} does not fit the architecture of {self.config or 'its family'} "
                f"({str(error).splitlines()[0]}): name a pipeline of the same architecture as "
                "`--backbone.config`."
            ) from error

    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration."""
        return dict(self._loaded.scheduler.config)

    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline."""
        return self._loaded.config.get(name, default)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet."""
        return self._loaded.unet.to(dtype)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Load the VAE."""
        return self._loaded.vae.to(dtype)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration, for which the complete file is read."""
        return dict(self._loaded.vae.config)

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        return getattr(self._loaded, name).to(dtype)

    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer of a name."""
        return getattr(self._loaded, name)


def load_component(
    kind: Any, source: str, name: str, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """Load a component of a pipeline, from a pipeline or by itself.

    Args:
        kind: The diffusers class.
        source: Hub name or folder of the component or of a pipeline, or a .json configuration,
            whose weights are initialised at random.
        name: The component's folder inside a pipeline.
        dtype: Precision of the weights.
        variant: Variant of the files.
    """
    if source.endswith(".json"):
        config = json.loads(find_config(source).read_text("utf-8"))
        return kind.from_config(config).to(dtype)
    alone = check_class(kind, source, name)
    with _loading(source, name):
        return kind.from_pretrained(
            source, subfolder=None if alone else name, torch_dtype=dtype, variant=variant
        )


def component_config(kind: Any, source: str, name: str) -> dict[str, Any]:
    """Load the configuration of a component, from the source that `load_component` takes."""
    with _loading(source, name):
        try:
            config: dict[str, Any] = kind.load_config(source, subfolder=name)
        except OSError:
            config = kind.load_config(source)
        return config


@contextmanager
def _loading(source: str, name: str) -> Iterator[None]:
    """Report errors of diffusers and transformers about files as input errors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source} has no {name} that can be loaded ({str(error).splitlines()[0]}): give a "
            "folder or a hub name of one, or of a complete pipeline."
        ) from error


def check_family(pipeline: type[DiffusionPipeline], source: str) -> None:
    """Check that a pipeline belongs to a family, if its configuration names one."""
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


def _keys(file: str) -> list[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors ({error}): name a complete .safetensors file."
        ) from error

"""Where the parts of a model come from: the hub, a diffusers folder, or a single file."""

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

from lit_prefopt.configs import find_config
from lit_prefopt.errors import InputError


class Components(ABC):
    """The parts of a stock diffusers pipeline, each loaded when it is asked for.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: Where they come from.
    """

    def __init__(self, pipeline: type[DiffusionPipeline], pretrained: str) -> None:
        self.pipeline, self.pretrained = pipeline, pretrained

    @abstractmethod
    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration."""

    @abstractmethod
    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline's own, such as `force_zeros_for_empty_prompt`."""

    @abstractmethod
    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet."""

    @abstractmethod
    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the VAE."""

    @abstractmethod
    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's configuration, for those who do without its weights."""

    @abstractmethod
    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Return the text encoder of that name, of a transformers class."""

    @abstractmethod
    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of that name."""


class FolderComponents(Components):
    """Parts in diffusers' layout: from the hub or a local folder.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: Hub name or folder.
        needed: Names of the parts that it must have.
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
                    f"{pretrained} has no {' and no '.join(missing)}: name the folder of a whole "
                    f"pipeline ({pipeline.__name__}); a UNet or a VAE alone goes to "
                    "`--backbone.denoiser` or `--backbone.vae`."
                )

    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration: the first thing that is asked of a checkpoint."""
        try:
            return DDPMScheduler.load_config(self.pretrained, subfolder="scheduler")
        except OSError as error:
            raise InputError(
                f"{self.pretrained} is neither a local folder in diffusers' layout nor a name that "
                "the hub answers to now: check the spelling, the connection, and access to gated "
                "models."
            ) from error

    def option(self, name: str, default: Any) -> Any:
        """Return an option from the pipeline's model_index.json."""
        return _pipeline_config(self.pipeline, self.pretrained).get(name, default)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet."""
        return load_component(UNet2DConditionModel, self.pretrained, "unet", dtype, self.variant)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the VAE."""
        return load_component(AutoencoderKL, self.pretrained, "vae", dtype, self.variant)

    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's configuration."""
        return component_config(AutoencoderKL, self.pretrained, "vae")

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Return the text encoder of that name."""
        with _loading(self.pretrained, name):
            return kind.from_pretrained(  # type: ignore[attr-defined]
                self.pretrained, subfolder=name, dtype=dtype, variant=self.variant
            )

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of that name."""
        with _loading(self.pretrained, name):
            return CLIPTokenizer.from_pretrained(self.pretrained, subfolder=name)


class SingleFileComponents(Components):
    """Parts out of one .safetensors file in the layout of the original release.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: The file.
        prefixes: The file's parts, and the beginning of the keys that belong to each.
        dtype: The finest precision that any part will be asked for.
        config: Hub name or folder of a pipeline of the same architecture; none: what diffusers
            takes from the hub for such a file.
        passed: Parts that come from elsewhere.
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
                "it: name a checkpoint of that family, or take the backbone of the file's own."
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
                f"{self.pretrained} says nothing of its architecture, and the hub cannot be asked "
                "now: give the folder of a pipeline of the same kind as `--backbone.config FOLDER`."
            ) from error
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.pretrained} does not fit the architecture of {self.config or 'its family'} "
                f"({str(error).splitlines()[0]}): name a pipeline of the same kind as "
                "`--backbone.config`."
            ) from error

    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration."""
        return dict(self._loaded.scheduler.config)

    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline's own."""
        return self._loaded.config.get(name, default)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet."""
        return self._loaded.unet.to(dtype)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the VAE."""
        return self._loaded.vae.to(dtype)

    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's configuration; the file is read whole for it."""
        return dict(self._loaded.vae.config)

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Return the text encoder of that name."""
        return getattr(self._loaded, name).to(dtype)

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of that name."""
        return getattr(self._loaded, name)


def load_component(
    kind: Any, source: str, name: str, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """Return a part of a pipeline, from the pipeline or from a place of its own.

    Args:
        kind: The diffusers class.
        source: Hub name or folder of the part or of a pipeline, or a .json configuration, which
            gives fresh weights.
        name: The part's folder inside a pipeline.
        dtype: Precision of the weights.
        variant: Variant of the files.
    """
    if source.endswith(".json"):
        config = json.loads(find_config(source).read_text("utf-8"))
        return kind.from_config(config).to(dtype)
    try:
        alone = kind.load_config(source).get("_class_name") == kind.__name__
    except OSError:
        alone = False
    with _loading(source, name):
        return kind.from_pretrained(
            source, subfolder=None if alone else name, torch_dtype=dtype, variant=variant
        )


def component_config(kind: Any, source: str, name: str) -> dict[str, Any]:
    """Return the configuration of what `load_component` loads."""
    with _loading(source, name):
        try:
            config: dict[str, Any] = kind.load_config(source, subfolder=name)
        except OSError:
            config = kind.load_config(source)
        return config


@contextmanager
def _loading(source: str, name: str) -> Iterator[None]:
    """Turn what diffusers and transformers raise over files into a sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source} holds no {name} that can be loaded ({str(error).splitlines()[0]}): name a "
            "folder or a hub name of one, or of a whole pipeline."
        ) from error


def check_family(pipeline: type[DiffusionPipeline], source: str) -> None:
    """Refuse a pipeline of another family, where it says what it is."""
    stated = _pipeline_config(pipeline, source).get("_class_name")
    image_to_image = pipeline.__name__.replace("Pipeline", "Img2ImgPipeline")
    if stated not in (None, pipeline.__name__, image_to_image, *_SAME_PARTS):
        raise InputError(
            f"{source} is a {stated} and not a {pipeline.__name__}: take the backbone of its "
            "family, or name a checkpoint of this one."
        )


_SAME_PARTS = ("LatentConsistencyModelPipeline",)
"""Pipelines that differ from their family's own in nothing but how they sample."""


def _pipeline_config(pipeline: type[DiffusionPipeline], source: str) -> dict[str, Any]:
    try:
        return dict(pipeline.load_config(source))
    except OSError:  # parts without a model_index.json make a pipeline too
        return {}


def _keys(file: str) -> list[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors ({error}): name a whole .safetensors file."
        ) from error

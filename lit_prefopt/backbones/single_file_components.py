"""Load the components of a model from a single .safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_prefopt.backbones.load_component import SINGLE_FILES
from lit_prefopt.backbones.loading import Components, FolderComponents, check_family
from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component, Family
from lit_prefopt.weights.checks import contents
from lit_prefopt.weights.component_files import WeightsFile, load_from_file
from lit_prefopt.weights.hub import check_reachable


class SingleFileComponents(Components):
    """Components from one .safetensors file in the layout of the original release.

    Args:
        family: The family of its model.
        pretrained: The file.
        config: Hub name or folder of a pipeline of the same architecture; by default diffusers'
            choice from the hub for such a file.
        passed: Names of the components that are not needed from it; one that is needed all the same
            comes from the pipeline of the same architecture.
    """

    def __init__(
        self,
        family: Family,
        pretrained: str,
        config: str | None = None,
        passed: Collection[str] = (),
    ) -> None:
        super().__init__(family, pretrained)
        self.config = config
        if config is not None:
            check_family(family, config)
        self.file = WeightsFile(pretrained)
        missing = [
            name
            for name, prefix in family.file_prefixes.items()
            if name not in passed and not self._has(prefix)
        ]
        if missing:
            raise InputError(
                f"{pretrained} has no {' and no '.join(missing)} where {family.pipelines[0]} has "
                f"it, but {contents(self.file.keys)}: name a checkpoint of that family, or take "
                f"the backbone of the file's family; a denoiser or a VAE alone goes "
                "to `--backbone.denoiser` or `--backbone.vae`."
            )

    @cached_property
    def architecture(self) -> FolderComponents:
        """The pipeline of the same architecture, of which only configurations are loaded."""
        return FolderComponents(self.family, self.config or published_config(self.file), [])

    @property
    def has_vae(self) -> bool:
        """Whether the file contains a VAE."""
        return self._has(self.family.vae.prefixes[0])

    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration."""
        return self.architecture.scheduler()

    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline."""
        return self.architecture.option(name, default)

    def denoiser(self, dtype: torch.dtype) -> Any:
        """Load the denoiser."""
        return self._component(self.family.denoiser, self.denoiser_config(), dtype)

    def denoiser_config(self) -> dict[str, Any]:
        """Load the denoiser's configuration."""
        return self.architecture.denoiser_config()

    def vae(self, dtype: torch.dtype) -> Any:
        """Load the VAE."""
        if not self.has_vae:
            return self.architecture.vae(dtype)
        return self._component(self.family.vae, self.vae_config(), dtype)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration."""
        return self.architecture.vae_config()

    def has_encoder(self, name: str) -> bool:
        """Whether the file or the pipeline of the same architecture has a text encoder."""
        part = self.family.components[name]
        return self._has(part.prefixes[0]) or self.architecture.has_encoder(name)

    def text_encoder(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        part = self.family.components[name]
        if not self._has(part.prefixes[0]):
            return self.architecture.text_encoder(name, dtype)
        config = self.architecture.text_config(name)
        return self._load(lambda: part.kind(config), part, dtype)

    def tokenizer(self, name: str, kind: Any) -> Any:
        """Load the tokenizer of a name and a transformers class."""
        return self.architecture.tokenizer(name, kind)

    def _has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.file.keys)

    def _component(self, part: Component, config: dict[str, Any], dtype: torch.dtype) -> Any:
        return self._load(lambda: part.kind.from_config(config), part, dtype)

    def _load(self, build: Callable[[], nn.Module], part: Component, dtype: torch.dtype) -> Any:
        return load_from_file(build, self.file, part, dtype, self.architecture.pretrained)


def open_components(
    family: Family,
    pretrained: str,
    encoders: list[str],
    *,
    variant: str | None,
    config: str | None,
    vae: str | None,
) -> Components:
    """Open the components of a model, from the hub, a folder or a single file.

    Args:
        family: The family of the model.
        pretrained: Hub name, folder or file.
        encoders: Names of the text encoders that are needed; with none, the VAE is not needed.
        variant: Variant of a folder's files.
        config: Source of a file's architecture.
        vae: Source of another VAE.
    """
    if vae is not None and not vae.endswith(".json"):
        check_reachable(vae)  # at once, not after the denoiser was read
    parts: Components
    if pretrained.endswith(SINGLE_FILES):
        # without encoders, they are not loaded, but a file without them is still of another kind
        passed = [] if vae is None and encoders else ["vae"]
        if not family.whole_files:  # the denoiser may be alone, under names without a prefix
            passed = list(family.components)
        parts = SingleFileComponents(family, pretrained, config, passed)
    else:
        needed = ["scheduler", *(["vae"] if encoders and vae is None else [])]
        needed += [
            x for name in encoders for x in (name, name.replace("text_encoder", "tokenizer"))
        ]
        parts = FolderComponents(family, pretrained, needed, variant)
    if vae is not None and parts.has_vae:
        rank_zero_info(
            f"{pretrained} contains a VAE, which is not used because the recipe names {vae}: to "
            "use it, set `--backbone.vae null`."
        )
    return parts


SHARED = ("black-forest-labs/FLUX.2-dev", "Tongyi-MAI/Z-Image-Turbo")
"""Pipelines that diffusers takes for those of all models of their family."""

QWEN_IMAGE = ".img_mod.1."
"""Part of the keys of Qwen-Image, which diffusers takes for Stable Diffusion 1.x."""


def published_config(file: WeightsFile) -> str:
    """Return the hub name of the pipeline whose architecture a single file has.

    Raises:
        InputError: The hub does not answer, or several models have such files.
    """
    name = str(fetch_diffusers_config(file.empty())["pretrained_model_name_or_path"])
    if name in SHARED or any(QWEN_IMAGE in key for key in file.keys):
        raise InputError(
            f"{file.path} does not contain its architecture and schedule, which models of its "
            "family differ in: give the hub name or the folder of its model's pipeline as "
            "`--backbone.config` (`--base_config` of an export)."
        )
    try:
        check_reachable(name)
    except InputError as error:
        raise InputError(
            f"{file.path} does not contain its architecture, and the hub, which has it as {name}, "
            "cannot be reached: give the folder of a pipeline of the same architecture as "
            "`--backbone.config FOLDER` (`--base_config` of an export)."
        ) from error
    return name

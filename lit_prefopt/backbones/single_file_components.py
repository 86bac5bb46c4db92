"""Load the components of a model from a single .safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_prefopt.backbones.load_component import SINGLE_FILES
from lit_prefopt.backbones.loading import Components, FolderComponents, check_family
from lit_prefopt.errors import InputError
from lit_prefopt.families.find import find_component
from lit_prefopt.weights.checks import contents
from lit_prefopt.weights.component_files import WeightsFile, load_from_file
from lit_prefopt.weights.hub import check_reachable


class SingleFileComponents(Components):
    """Components from one .safetensors file in the layout of the original release.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: The file.
        prefixes: The file's components, and the prefix of the keys of each.
        config: Hub name or folder of a pipeline of the same architecture; by default diffusers'
            choice from the hub for such a file.
        passed: Names of the components that are not needed from it.
    """

    def __init__(
        self,
        pipeline: type[DiffusionPipeline],
        pretrained: str,
        prefixes: dict[str, str],
        config: str | None = None,
        passed: Collection[str] = (),
    ) -> None:
        super().__init__(pipeline, pretrained)
        self.config = config
        if config is not None:
            check_family(pipeline, config)
        self.file = WeightsFile(pretrained)
        missing = [
            name
            for name, prefix in prefixes.items()
            if name not in passed and not any(key.startswith(prefix) for key in self.file.keys)
        ]
        if missing:
            raise InputError(
                f"{pretrained} has no {' and no '.join(missing)} where {pipeline.__name__} has "
                f"it, but {contents(self.file.keys)}: name a checkpoint of that family, or take "
                "the backbone of the file's family; a UNet or a VAE alone goes to "
                "`--backbone.denoiser` or `--backbone.vae`."
            )

    @cached_property
    def architecture(self) -> FolderComponents:
        """The pipeline of the same architecture, of which only configurations are loaded."""
        return FolderComponents(self.pipeline, self.config or published_config(self.file), [])

    @property
    def has_vae(self) -> bool:
        """Whether the file contains a VAE."""
        return any(key.startswith("first_stage_model.") for key in self.file.keys)

    def scheduler(self) -> dict[str, Any]:
        """Load the scheduler's configuration."""
        return self.architecture.scheduler()

    def option(self, name: str, default: Any) -> Any:
        """Return an option of the pipeline."""
        return self.architecture.option(name, default)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet."""
        config = self.unet_config()
        return self._load(
            UNet2DConditionModel, "unet", lambda kind: kind.from_config(config), dtype
        )

    def unet_config(self) -> dict[str, Any]:
        """Load the UNet's configuration."""
        return self.architecture.unet_config()

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Load the VAE."""
        config = self.vae_config()
        return self._load(AutoencoderKL, "vae", lambda kind: kind.from_config(config), dtype)

    def vae_config(self) -> dict[str, Any]:
        """Load the VAE's configuration."""
        return self.architecture.vae_config()

    def text_encoder(self, name: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a name."""
        config = self.architecture.text_config(name, kind)
        return self._load(kind, name, lambda kind: kind(config), dtype)

    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer of a name."""
        return self.architecture.tokenizer(name)

    def _load(
        self, kind: Any, name: str, build: Callable[[Any], nn.Module], dtype: torch.dtype
    ) -> Any:
        component = find_component(name, kind.__name__)
        assert component is not None, f"{kind.__name__} is in no family"
        source = self.architecture.pretrained
        return load_from_file(lambda: build(kind), self.file, component, dtype, source)


def open_components(
    pipeline: type[DiffusionPipeline],
    pretrained: str,
    prefixes: dict[str, str],
    encoders: list[str],
    *,
    variant: str | None,
    config: str | None,
    vae: str | None,
) -> Components:
    """Open the components of a model, from the hub, a folder or a single file.

    Args:
        pipeline: The stock pipeline's class.
        pretrained: Hub name, folder or file.
        prefixes: A file's components, and the prefix of the keys of each.
        encoders: Names of the text encoders that are needed; with none, the VAE is not needed.
        variant: Variant of a folder's files.
        config: Source of a file's architecture.
        vae: Source of another VAE.
    """
    if vae is not None and not vae.endswith(".json"):
        check_reachable(vae)  # at once, not after the UNet was read
    parts: Components
    if pretrained.endswith(SINGLE_FILES):
        # without encoders, they are not loaded, but a file without them is still of another kind
        passed = [] if vae is None and encoders else ["vae"]
        parts = SingleFileComponents(pipeline, pretrained, prefixes, config, passed)
    else:
        needed = ["scheduler", *(["vae"] if encoders and vae is None else [])]
        needed += [
            x for name in encoders for x in (name, name.replace("text_encoder", "tokenizer"))
        ]
        parts = FolderComponents(pipeline, pretrained, needed, variant)
    if vae is not None and parts.has_vae:
        rank_zero_info(
            f"{pretrained} contains a VAE, which is not used because the recipe names {vae}: to "
            "use it, set `--backbone.vae null`."
        )
    return parts


def published_config(file: WeightsFile) -> str:
    """Return the hub name of the pipeline whose architecture a single file has.

    Raises:
        InputError: The hub does not answer.
    """
    name = str(fetch_diffusers_config(file.empty())["pretrained_model_name_or_path"])
    try:
        check_reachable(name)
    except InputError as error:
        raise InputError(
            f"{file.path} does not contain its architecture, and the hub, which has it as {name}, "
            "cannot be reached: give the folder of a pipeline of the same architecture as "
            "`--backbone.config FOLDER` (`--base_config` of an export)."
        ) from error
    return name

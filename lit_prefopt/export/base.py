"""The pipeline that trained weights belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lit_prefopt.configs import find_config
from lit_prefopt.errors import InputError
from lit_prefopt.export.merge import pipeline_parts

KINDS = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}
"""Where the parts of such a pipeline come from; a folder may not name any other."""

COMPARED = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")


class Base:
    """A Stable Diffusion 1.x, 2.x or SDXL pipeline, of which only the configuration is read yet.

    Args:
        name: Hub name, folder in diffusers' layout, or single .safetensors file.
        config: For a single file, the hub name or folder of a pipeline of the same form.
        variant: Variant of the pipeline's files, such as `fp16`.

    Raises:
        InputError: There is no such pipeline, or it is of another kind.
    """

    def __init__(self, name: str, config: str | None = None, variant: str | None = None) -> None:
        self.name, self.variant = name, variant
        self.single = name.endswith(".safetensors")
        if self.single and config is None:
            raise InputError(
                f"{name} is a single file: name a pipeline of the same form as `--base_config`, "
                "such as stable-diffusion-v1-5/stable-diffusion-v1-5 or a local folder."
            )
        self.config = config if self.single and config else name
        try:
            index = DiffusionPipeline.load_config(self.config)
            self.unet_config: dict[str, Any] = UNet2DConditionModel.load_config(
                self.config, subfolder="unet"
            )
            self.scheduler_config = DDPMScheduler.load_config(self.config, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.config} is neither a whole pipeline in diffusers' layout nor a name that "
                "the hub answers to now: name the pipeline that was trained as `--base`."
            ) from error
        self._check(index)
        self.kind = KINDS[index["_class_name"]]

    def _check(self, index: dict[str, Any]) -> None:
        """Refuse other families, and folders that name code of their own."""
        kind = index.get("_class_name")
        if kind not in KINDS:
            raise InputError(f"{self.config} is a {kind}; exports know {' and '.join(KINDS)}.")
        libraries = {value[0] for value in index.values() if isinstance(value, list)}
        files = {str(path) for path in Path(self.config).glob("*/*.py")}
        if strange := (libraries - LIBRARIES) | files:
            raise InputError(
                f"{self.config} wants code of {', '.join(sorted(strange))}, which is not run: name "
                "a pipeline that diffusers and transformers load by themselves."
            )

    @cached_property
    def family(self) -> str:
        """`sd1`, `sd2` or `sdxl`: whose layout a single file of it has."""
        if self.kind is StableDiffusionXLPipeline:
            return "sdxl"
        # OpenCLIP's text encoder, which SD 2.x has, has a plain GELU
        return "sd2" if self._text_config("text_encoder").hidden_act == "gelu" else "sd1"

    @property
    def encoders(self) -> tuple[str, ...]:
        """Its text encoders' names in the pipeline."""
        both = self.kind is StableDiffusionXLPipeline
        return ("text_encoder", "text_encoder_2") if both else ("text_encoder",)

    @property
    def v_prediction(self) -> bool:
        """Whether the denoiser says v instead of the noise."""
        return self.scheduler_config.get("prediction_type") == "v_prediction"

    @property
    def side(self) -> int | None:
        """Height and width of the images that it was made for, in pixels, if it tells."""
        size = self.unet_config.get("sample_size")
        if not isinstance(size, int):
            return None
        blocks = AutoencoderKL.load_config(self.config, subfolder="vae")["block_out_channels"]
        return size * 2 ** (len(blocks) - 1)

    def skeleton(self) -> dict[str, nn.Module]:
        """Return UNet and text encoders without weights: names and shapes."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        with torch.device("meta"):
            encoders = [
                kind(self._text_config(part))
                for part, kind in zip(self.encoders, kinds, strict=False)
            ]
            return pipeline_parts(UNet2DConditionModel.from_config(self.unet_config), encoders)

    def unet(self) -> UNet2DConditionModel:
        """Return its UNet in float32."""
        with self._readable():
            if self.single:
                return UNet2DConditionModel.from_single_file(
                    self.name, config=self.config, subfolder="unet", torch_dtype=torch.float32
                )
            return UNet2DConditionModel.from_pretrained(
                self.name, subfolder="unet", variant=self.variant, use_safetensors=True
            )

    def pipeline(self, unet: UNet2DConditionModel) -> DiffusionPipeline:
        """Return the whole pipeline with another UNet in it; the other parts are float32."""
        self.check_form(unet)
        with self._readable():
            if self.single:
                return self.kind.from_single_file(self.name, config=self.config, unet=unet)
            return self.kind.from_pretrained(
                self.name, unet=unet, variant=self.variant, use_safetensors=True
            )

    def check_form(self, unet: UNet2DConditionModel) -> None:
        """Refuse a UNet that is not of this base's form."""
        for key in COMPARED:
            ours, theirs = (json.dumps(c.get(key)) for c in (self.unet_config, unet.config))
            if ours != theirs:
                raise InputError(
                    f"The UNet's {key} is {theirs}, that of {self.name} {ours}: name the pipeline "
                    "that was trained as `--base`."
                )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say in a sentence what the many errors of loading mean."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as e:
            raise InputError(
                f"{self.name} does not hold all weights of a pipeline as .safetensors (others are "
                "never opened): name one that does as `--base`, with `--variant` if it needs one."
            ) from e

    def _text_config(self, part: str) -> CLIPTextConfig:
        return CLIPTextConfig.from_pretrained(self.config, subfolder=part)


def load_unet(source: str) -> UNet2DConditionModel:
    """Return the UNet of a folder or hub name, of its own or of a pipeline, in float32."""
    try:
        return UNet2DConditionModel.from_pretrained(
            source, subfolder=_subfolder(source), use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{source} holds no whole UNet in diffusers' layout (config.json and .safetensors)."
        ) from error


def load_unet_config(source: str) -> dict[str, Any]:
    """Return the configuration of a UNet: of a folder, of a hub name, or a .json."""
    if source.endswith(".json"):
        read: dict[str, Any] = json.loads(find_config(source).read_text("utf-8"))
        return read
    return UNet2DConditionModel.load_config(source, subfolder=_subfolder(source))


def _subfolder(source: str) -> str | None:
    return None if (Path(source) / "config.json").is_file() else "unet"

"""Base pipeline of trained weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lit_prefopt.backbones.component_checks import check_vae
from lit_prefopt.backbones.load_component import find_variant, from_folder, load_component
from lit_prefopt.backbones.single_file_components import published_config
from lit_prefopt.errors import InputError
from lit_prefopt.export.recipe import Recipe
from lit_prefopt.processes.marks import source_marks
from lit_prefopt.processes.schedule import check_scheduler, restate_scheduler
from lit_prefopt.weights.checks import first_line
from lit_prefopt.weights.component_files import WeightsFile, load_from_file
from lit_prefopt.weights.hub import check_reachable
from lit_prefopt.weights.merge import pipeline_parts

KINDS = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionImg2ImgPipeline": StableDiffusionPipeline,
    "LatentConsistencyModelPipeline": LatentConsistencyModelPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXLPipeline,
}
"""Pipeline classes that can be exported, with their families."""

TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
"""Classes of a pipeline's text encoders."""

LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}
"""Packages whose classes a pipeline folder may name."""

COMPARED = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")


class BasePipeline:
    """A Stable Diffusion 1.x, 2.x or SDXL pipeline; only its configuration is loaded at first.

    Args:
        name: Hub name, folder in diffusers' layout, or single .safetensors file.
        config: For a single file, the hub name or folder of a pipeline of the same architecture;
            by default the one that diffusers downloads from the hub.
        variant: Variant of the pipeline's files, such as `fp16`.
        prediction: Prediction type of the denoiser, if the scheduler's configuration and the marks
            of a single file are wrong.
        zero_terminal_snr: Whether the noise schedule ends in pure noise, likewise.
        denoiser: Hub name, folder or file of a denoiser that replaces the pipeline's, for its
            marks.

    Raises:
        InputError: The pipeline does not exist or is not supported.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        variant: str | None = None,
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
        denoiser: str | None = None,
    ) -> None:
        self.name, self.variant = name, variant
        self.single = name.endswith(".safetensors")
        self.config = (config or published_config(WeightsFile(name))) if self.single else name
        check_reachable(self.config)
        try:
            index = DiffusionPipeline.load_config(self.config)
            self.unet_config: dict[str, Any] = UNet2DConditionModel.load_config(
                self.config, subfolder="unet"
            )
            self.scheduler_config = DDPMScheduler.load_config(self.config, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.config} is neither a complete pipeline in diffusers' layout nor a name "
                "available on the hub: name the pipeline that was trained as `--base` "
                "(`--model.base` of an evaluation), and one of the same architecture as "
                "`--base_config` (`--model.config`) if that is a single file."
            ) from error
        self.stated = source_marks(denoiser, name).config
        self.stated |= {} if prediction is None else {"prediction_type": prediction}
        if zero_terminal_snr is not None:
            self.stated["rescale_betas_zero_snr"] = zero_terminal_snr
        self.scheduler_config = self.scheduler_config | self.stated
        check_scheduler(self.scheduler_config)
        self._check(index)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> BasePipeline:
        """Return the pipeline that a recipe names."""
        return cls(
            str(recipe.pretrained),
            recipe.config,
            recipe.variant,
            recipe.prediction,
            recipe.zero_terminal_snr,
            recipe.denoiser,
        )

    def _check(self, index: dict[str, Any]) -> None:
        """Raise InputError for other families, and for folders with code of their own."""
        kind = index.get("_class_name")
        if kind not in KINDS:
            raise InputError(f"{self.config} is a {kind}; supported are {', '.join(KINDS)}.")
        self.kind = KINDS[kind]
        if missing := [name for name in self.encoders if not index.get(name, [None])[0]]:
            raise InputError(f"{self.config} has no {' and no '.join(missing)}: name a whole one.")
        libraries = {value[0] for value in index.values() if isinstance(value, list)}
        files = {str(path) for path in Path(self.config).glob("*/*.py")}
        if strange := (libraries - LIBRARIES) | files:
            raise InputError(
                f"{self.config} needs code of {', '.join(sorted(strange))}, which is not executed: "
                "name a pipeline of diffusers' and transformers' own classes."
            )

    @cached_property
    def family(self) -> str:
        """The family, which sets a single file's layout: `sd1`, `sd2` or `sdxl`."""
        if self.kind is StableDiffusionXLPipeline:
            return "sdxl"
        # OpenCLIP's text encoder, that of SD 2.x, has a plain GELU
        return "sd2" if self._text_config("text_encoder").hidden_act == "gelu" else "sd1"

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of its text encoders in the pipeline."""
        both = self.kind is StableDiffusionXLPipeline
        return ("text_encoder", "text_encoder_2") if both else ("text_encoder",)

    @property
    def v_prediction(self) -> bool:
        """Whether the denoiser predicts v instead of the noise."""
        return bool(self.scheduler_config.get("prediction_type") == "v_prediction")

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule ends in pure noise."""
        return bool(self.scheduler_config.get("rescale_betas_zero_snr"))

    @property
    def side(self) -> int | None:
        """Native height and width of its images in pixels, if it is known."""
        size = self.unet_config.get("sample_size")
        if not isinstance(size, int):
            return None
        blocks = self.vae_config()["block_out_channels"]
        return size * 2 ** (len(blocks) - 1)

    def skeleton(self) -> dict[str, nn.Module]:
        """Return UNet and text encoders without weights: names and shapes."""
        with torch.device("meta"):
            encoders = [
                kind(self._text_config(part))
                for part, kind in zip(self.encoders, TEXT_ENCODERS, strict=False)
            ]
            return pipeline_parts(UNet2DConditionModel.from_config(self.unet_config), encoders)

    def unet(self) -> UNet2DConditionModel:
        """Load its UNet in float32."""
        return self._part(UNet2DConditionModel, "unet")

    def pipeline(self, unet: UNet2DConditionModel, vae: str | None) -> DiffusionPipeline:
        """Load the complete pipeline in float32, as an LCM's if its UNet was distilled into one.

        Args:
            unet: Replaces the pipeline's UNet.
            vae: Hub name, folder or file of a VAE that replaces the pipeline's, or None.
        """
        self.check_form(unet)
        parts: dict[str, Any] = {"unet": unet}
        parts["vae"] = (
            self._part(AutoencoderKL, "vae")
            if vae is None
            else load_component(AutoencoderKL, vae, "vae", torch.float32, config=self.vae_config)
        )
        for name, kind in zip(self.encoders, TEXT_ENCODERS, strict=False):
            parts[name] = self._text_encoder(name, kind)
        with self._readable():
            if self.single:
                pipeline = self.kind.from_single_file(self.name, config=self.config, **parts)
            else:
                variant = find_variant(Path(self.name) / "unet", self.variant)
                pipeline = self.kind.from_pretrained(
                    self.name, variant=variant, use_safetensors=True, **parts
                )
        took_guidance = self.unet_config.get("time_cond_proj_dim") is not None
        if self.kind is StableDiffusionPipeline and not took_guidance and _takes_guidance(unet):
            pipeline = _lcm(pipeline)
        if self.stated:
            pipeline.scheduler = restate_scheduler(pipeline.scheduler, self.stated)
        check_vae(pipeline.vae.config, vae or self.name, unet.config.in_channels)
        return pipeline

    def check_form(self, unet: UNet2DConditionModel) -> None:
        """Raise InputError if a UNet's configuration differs from this base's."""
        for key in COMPARED:
            ours, theirs = (json.dumps(c.get(key)) for c in (self.unet_config, unet.config))
            if ours != theirs:
                raise InputError(
                    f"The UNet's {key} is {theirs}, that of {self.name} is {ours}: name the "
                    "pipeline that was trained as `--base`."
                )

    def vae_config(self) -> dict[str, Any]:
        """Load the configuration of its VAE."""
        config: dict[str, Any] = AutoencoderKL.load_config(self.config, subfolder="vae")
        return config

    def _part(self, kind: Any, name: str) -> Any:
        """Load its UNet or its VAE in float32."""
        if self.single:
            config = self.unet_config if name == "unet" else self.vae_config()
            return self._from_file(lambda: kind.from_config(config), name)
        with self._readable():
            return load_component(
                kind, self.name, name, torch.float32, self.variant, use_safetensors=True
            )

    def _text_encoder(self, name: str, kind: type[nn.Module]) -> nn.Module:
        """Load a text encoder in float32."""
        if self.single:
            config = self._text_config(name)
            return self._from_file(lambda: kind(config), name)
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        with self._readable():
            encoder: nn.Module = from_folder(kind, self.name, name, name, self.variant, **options)
            return encoder

    def _from_file(self, build: Callable[[], nn.Module], name: str) -> nn.Module:
        return load_from_file(build, WeightsFile(self.name), name, torch.float32, self.config)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Raise InputError for the errors of loading."""
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as e:
            raise InputError(
                f"{self.name} is no complete pipeline as .safetensors ({first_line(e)}; other "
                "files are never opened): name one that is as `--base`, with `--variant` if it "
                "needs one."
            ) from e

    def _text_config(self, part: str) -> CLIPTextConfig:
        return CLIPTextConfig.from_pretrained(self.config, subfolder=part, trust_remote_code=False)


def _takes_guidance(unet: UNet2DConditionModel) -> bool:
    """Return whether a UNet is conditioned on the guidance scale."""
    return unet.config.time_cond_proj_dim is not None


def _lcm(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline as a latent consistency model's."""
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    parts = pipeline.components | {"scheduler": scheduler}
    checked = pipeline.config.get("requires_safety_checker", True)
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=checked)

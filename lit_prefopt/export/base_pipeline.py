"""Base pipeline of trained weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig

from lit_prefopt.backbones.component_checks import check_vae
from lit_prefopt.backbones.load_component import find_variant, from_folder, load_component
from lit_prefopt.backbones.single_file_components import published_config
from lit_prefopt.errors import InputError
from lit_prefopt.export.recipe import Recipe
from lit_prefopt.families.base import Component, Family
from lit_prefopt.families.known import family_of
from lit_prefopt.processes.marks import source_marks
from lit_prefopt.processes.schedule import check_scheduler, restate_scheduler
from lit_prefopt.weights.checks import first_line
from lit_prefopt.weights.component_files import WeightsFile, load_from_file
from lit_prefopt.weights.hub import check_reachable

LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}
"""Packages whose classes a pipeline folder may name."""


class BasePipeline:
    """A pipeline of a known family; only its configuration is loaded at first.

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
            self.index: dict[str, Any] = DiffusionPipeline.load_config(self.config)
            self._check_kind()
            self.denoiser_config: dict[str, Any] = self.family.denoiser.kind.load_config(
                self.config, subfolder=self.family.denoiser.name
            )
            self.scheduler_config = DDPMScheduler.load_config(self.config, subfolder="scheduler")
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.config} is neither a complete pipeline in diffusers' layout nor a name "
                "available on the hub: name the pipeline that was trained as `--base` "
                "(`--model.base` of an evaluation), and one of the same architecture as "
                "`--base_config` (`--model.config`) if that is a single file."
            ) from error
        self.stated: dict[str, Any] = {}
        if self.family.noise == "ddpm":
            self.stated = source_marks(denoiser, name).config
            self.stated |= {} if prediction is None else {"prediction_type": prediction}
            if zero_terminal_snr is not None:
                self.stated["rescale_betas_zero_snr"] = zero_terminal_snr
            self.scheduler_config = self.scheduler_config | self.stated
            check_scheduler(self.scheduler_config)

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

    def _check_kind(self) -> None:
        """Raise InputError for other families, and for folders with code of their own."""
        needed = [part.name for part in self.family.encoders if not part.optional]
        if missing := [name for name in needed if not self._has(name)]:
            raise InputError(f"{self.config} has no {' and no '.join(missing)}: name a whole one.")
        libraries = {value[0] for value in self.index.values() if isinstance(value, list)}
        files = {str(path) for path in Path(self.config).glob("*/*.py")}
        if strange := (libraries - LIBRARIES) | files:
            raise InputError(
                f"{self.config} needs code of {', '.join(sorted(strange))}, which is not executed: "
                "name a pipeline of diffusers' and transformers' own classes."
            )

    def _has(self, name: str) -> bool:
        """Whether the pipeline's index names a component."""
        return bool(self.index.get(name, [None])[0])

    @cached_property
    def family(self) -> Family:
        """The family, which sets all names of weights."""
        return family_of(
            self.index.get("_class_name"),
            self.config,
            lambda: self._text_config("text_encoder", CLIPTextConfig).to_dict(),
        )

    @cached_property
    def encoders(self) -> dict[str, Component]:
        """Its text encoders by their names in the pipeline, without those that it lacks."""
        folder = Path(self.config)
        return {
            part.name: part
            for part in self.family.encoders
            if self._has(part.name)
            # the largest one may have been left out of a copy
            and not (part.optional and folder.is_dir() and not (folder / part.name).is_dir())
        }

    @property
    def kind(self) -> type[DiffusionPipeline]:
        """Class of the stock pipeline."""
        stated = str(self.index["_class_name"])
        own: type[DiffusionPipeline] = self.family.pipeline
        return getattr(diffusers, stated) if stated == self.family.distilled_pipeline else own

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
        size = self.denoiser_config.get("sample_size")
        if not isinstance(size, int):
            return None
        blocks = self.vae_config()["block_out_channels"]
        return size * 2 ** (len(blocks) - 1)

    def skeleton(self) -> dict[str, nn.Module]:
        """Return denoiser and text encoders without weights: names and shapes."""
        denoiser = self.family.denoiser
        with torch.device("meta"):
            parts = {denoiser.name: denoiser.kind.from_config(self.denoiser_config)}
            return parts | {
                name: part.kind(self._text_config(name, part.kind.config_class))
                for name, part in self.encoders.items()
            }

    def denoiser(self) -> Any:
        """Load its denoiser in float32."""
        return self._part(self.family.denoiser, self.denoiser_config)

    def pipeline(self, denoiser: Any, vae: str | None) -> DiffusionPipeline:
        """Load the complete pipeline in float32, as an LCM's if its UNet was distilled into one.

        Args:
            denoiser: Replaces the pipeline's denoiser.
            vae: Hub name, folder or file of a VAE that replaces the pipeline's, or None.
        """
        self.check_form(denoiser)
        own, other = self.family.denoiser.name, self.family.vae
        parts: dict[str, Any] = {own: denoiser}
        parts[other.name] = (
            self._part(other, self.vae_config())
            if vae is None
            else load_component(other.kind, vae, other.name, torch.float32, config=self.vae_config)
        )
        for part in self.family.encoders:
            if part.name in self.encoders:
                parts[part.name] = self._text_encoder(part)
            else:  # the stock loader fails on a missing one that it is not told of
                parts |= {part.name: None, part.name.replace("text_encoder", "tokenizer"): None}
        with self._readable():
            if self.single and self.family.whole_files:
                pipeline = self.kind.from_single_file(self.name, config=self.config, **parts)
            else:  # not every stock pipeline reads single files
                variant = find_variant(Path(self.config) / own, self.variant)
                pipeline = self.kind.from_pretrained(
                    self.config, variant=variant, use_safetensors=True, **parts
                )
        distilled = self.family.distilled_pipeline
        width = self.family.denoiser.guidance_width
        added = width(denoiser.config) is not None and width(self.denoiser_config) is None
        if distilled is not None and added and self.kind.__name__ != distilled:
            pipeline = _lcm(pipeline, getattr(diffusers, distilled))
        if self.stated:
            pipeline.scheduler = restate_scheduler(pipeline.scheduler, self.stated)
        channels = denoiser.config.in_channels // self.family.packed
        check_vae(pipeline.vae.config, vae or self.name, channels, self.family.scale)
        return pipeline

    def check_form(self, denoiser: Any) -> None:
        """Raise InputError if a denoiser's configuration differs from this base's."""
        for key in self.family.compared:
            ours, theirs = (json.dumps(c.get(key)) for c in (self.denoiser_config, denoiser.config))
            if ours != theirs:
                raise InputError(
                    f"The {self.family.denoiser.name}'s {key} is {theirs}, that of {self.name} is "
                    f"{ours}: name the pipeline that was trained as `--base`."
                )

    def vae_config(self) -> dict[str, Any]:
        """Load the configuration of its VAE."""
        vae = self.family.vae
        config: dict[str, Any] = vae.kind.load_config(self.config, subfolder=vae.name)
        return config

    def _part(self, part: Component, config: dict[str, Any]) -> Any:
        """Load its denoiser or its VAE in float32."""
        if self._in_file(part):
            return self._from_file(lambda: part.kind.from_config(config), part)
        with self._readable():
            return load_component(
                part.kind, self.config, part.name, torch.float32, self.variant, use_safetensors=True
            )

    def _in_file(self, part: Component) -> bool:
        """Whether a component is read from a single file, not from its architecture's pipeline."""
        if not self.single or self.family.whole_files or part is self.family.denoiser:
            return self.single
        return any(key.startswith(part.prefixes[0]) for key in WeightsFile(self.name).keys)

    def _text_encoder(self, part: Component) -> nn.Module:
        """Load a text encoder in float32."""
        kind, name = part.kind, part.name
        if self._in_file(part):
            config = self._text_config(name, kind.config_class)
            return self._from_file(lambda: kind(config), part)
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        with self._readable():
            encoder: nn.Module = from_folder(kind, self.config, name, name, self.variant, **options)
            return encoder

    def _from_file(self, build: Callable[[], nn.Module], part: Component) -> nn.Module:
        return load_from_file(build, WeightsFile(self.name), part, torch.float32, self.config)

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

    def _text_config(self, name: str, kind: Any) -> Any:
        return kind.from_pretrained(self.config, subfolder=name, trust_remote_code=False)


def _lcm(pipeline: DiffusionPipeline, kind: Any) -> DiffusionPipeline:
    """Return the pipeline as a latent consistency model's."""
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    parts = pipeline.components | {"scheduler": scheduler}
    checked = pipeline.config.get("requires_safety_checker", True)
    return kind(**parts, requires_safety_checker=checked)

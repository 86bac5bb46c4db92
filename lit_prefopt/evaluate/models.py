"""Load any model by its name, for sampling."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from lit_prefopt import backbones
from lit_prefopt.backbones import Backbone
from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.recipe import TOYS, Recipe
from lit_prefopt.export.trained_weights import TrainedWeights, read_trained_weights
from lit_prefopt.families.base import Family
from lit_prefopt.utils.fingerprint import fingerprint
from lit_prefopt.weights.lora_files import is_adapter, read_lora
from lit_prefopt.weights.merge import merge_lora

DType = Literal["float32", "bfloat16", "float16"]
FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")


class LoadedModel(NamedTuple):
    """A loaded, frozen model."""

    name: str
    family: str  # such as `sdxl`
    backbone: Backbone

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the model."""
        return {
            "name": self.name,
            **_source(self.name),
            "family": self.family,
            "backbone": type(self.backbone).__name__,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "weights": fingerprint(self.backbone),
        }


def load_model(
    name: str,
    base: str | None = None,
    dtype: DType = "float32",
    variant: str | None = None,
    config: str | None = None,
) -> LoadedModel:
    """Load a model by its name.

    Args:
        name: A hub name; a folder or single .safetensors file of a whole pipeline; a denoiser's
            folder; a LoRA's .safetensors file; a checkpoint (.ckpt) or the folder of a run of
            this library; `toy` or `toy-flow` for the toy
            world's.
        base: The pipeline that a LoRA or a denoiser belongs to, if it has no recipe.
        dtype: Precision of the weights.
        variant: Variant of the pipeline's files, such as `fp16`.
        config: Hub name or folder of a pipeline of the same architecture as a single file.

    Raises:
        InputError: There is no such model, or its pipeline is not known.
    """
    origin = _origin(name)
    recipe = origin.recipe
    if recipe.pretrained is None:
        if base is None:
            raise InputError(
                f"{name} has no recipe that names its pipeline: name it as `--model.base`, a "
                "hub name or a folder."
            )
        named = TOYS.get(base, Recipe(pretrained=base))
        recipe = recipe._replace(
            pretrained=named.pretrained, t5=named.t5, text_tokens=named.text_tokens
        )
    recipe = recipe._replace(variant=recipe.variant or variant, config=recipe.config or config)
    pretrained = str(recipe.pretrained)
    pipeline = BasePipeline.from_recipe(recipe)
    backbone = _build(pipeline, pretrained, recipe, origin, dtype)
    _complete(backbone, pipeline.family, origin._replace(recipe=recipe))
    backbone.freeze()
    backbone.eval()
    return LoadedModel(name, pipeline.family.name, backbone)


def check_alike(policy: LoadedModel, reference: LoadedModel) -> None:
    """Check that two models can be compared with the same settings and seeds.

    Raises:
        InputError: They are of different families, or are sampled in different ways.
    """
    if policy.family != reference.family:
        raise InputError(
            f"{policy.name} is of the family {policy.family} and {reference.name} of "
            f"{reference.family}, so the same seed gives different noise: compare two models "
            "of one family, or evaluate each against its own base."
        )
    kinds = [type(model.backbone.process) for model in (policy, reference)]
    if kinds[0] is not kinds[1]:
        raise InputError(
            f"One of {policy.name} and {reference.name} is a latent consistency model, which needs "
            "its own sampler: compare it with another one, or evaluate each against its base."
        )
    shapes = [model.backbone.latent_shape for model in (policy, reference)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{policy.name} has latents of {shapes[0]} and {reference.name} of {shapes[1]}, so the "
            "same seed gives different noise: compare two models of one size."
        )


def _origin(name: str) -> TrainedWeights:
    if name in TOYS:
        return TrainedWeights(name, TOYS[name])
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file() and not _is_lora(path):
        return TrainedWeights(name, Recipe(pretrained=name))
    if path.exists():
        origin = read_trained_weights(name)
        # of a whole pipeline the denoiser is one part among others
        return origin._replace(denoiser=None) if (path / "model_index.json").is_file() else origin
    if path.suffix in FILES or name.startswith((".", "/", "~")):
        raise InputError(f"{name} does not exist; name a model's file or folder, or a hub name.")
    return TrainedWeights(name, Recipe(pretrained=name))


def _is_lora(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            return is_adapter(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file: copy it again.") from error


def _build(
    pipeline: BasePipeline, pretrained: str, recipe: Recipe, origin: TrainedWeights, dtype: DType
) -> Backbone:
    """Load the pipeline as a backbone, with a denoiser from a folder of its own."""
    family, folder = pipeline.family, origin.denoiser
    arguments: dict[str, Any] = {
        "denoiser": str(folder) if isinstance(folder, Path) else recipe.denoiser,
        "vae": recipe.vae,
        "variant": recipe.variant,
        "config": recipe.config,
        "prediction": recipe.prediction,
        "zero_terminal_snr": recipe.zero_terminal_snr,
        "t5": recipe.t5,
        "text_tokens": recipe.text_tokens,
        "distilled": True if family.noise == "flow" else None,  # evaluation trains nothing
        "start_lora": recipe.start_lora if origin.lora is not None else None,
        "reference": "none",
        "dtype": dtype,
        "policy_dtype": "float32" if dtype == "float16" else dtype,
    }
    # a family takes only the arguments that its process has
    arguments = {name: value for name, value in arguments.items() if value is not None}
    kind = family.backbone
    if family.distilled_backbone is not None:
        config: dict[str, Any] = pipeline.denoiser_config
        if isinstance(folder, Path):
            config = family.denoiser.kind.load_config(folder)
        own, added = family.denoiser.guidance_width(config), None
        if isinstance(folder, dict) and own is None:
            added = next(iter(family.denoiser.stored_guidance(folder).values()), None)
        if own or added or pipeline.kind.__name__ == family.distilled_pipeline:
            kind = family.distilled_backbone
            arguments |= {"guidance_width": added}
    backbone: Backbone = getattr(backbones, kind)(pretrained, **arguments)
    return backbone


def _complete(backbone: Backbone, family: Family, origin: TrainedWeights) -> None:
    """Load the weights of a checkpoint or of a LoRA into a backbone."""
    net = backbone.policy.denoiser
    encoders = {n: net for n, net in backbone.encoders.items() if n != family.vae.name}
    if isinstance(origin.denoiser, dict):
        try:
            net.load_state_dict(origin.denoiser)
        except RuntimeError as error:
            raise InputError(
                f"{origin.name} holds the weights of another {family.denoiser.name} than "
                f"{origin.recipe.pretrained} has: name the pipeline that was trained as "
                "`--model.base`."
            ) from error
    if origin.lora is not None:
        merge_lora(family, net, encoders, origin.lora)
    elif origin.recipe.start_lora is not None:  # merged in the denoiser, not in the text encoders
        start = read_lora(origin.recipe.start_lora).without_denoiser()
        merge_lora(family, net, encoders, start)


def _source(name: str) -> dict[str, Any]:
    """Return the hash of a file, or the commit of a hub name if it is known."""
    if Path(name).is_file():
        with open(name, "rb") as stream:
            return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    if name in TOYS or Path(name).exists():
        return {}
    cached = try_to_load_from_cache(name, "model_index.json")
    return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}

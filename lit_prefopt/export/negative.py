"""Load a negative model, the branch without prompt of guidance (Diffusion-NPO, ICLR 2025)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import ModelMixin

from lit_prefopt.backbones import Backbone
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.backbones.policy import freeze
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.recipe import Recipe
from lit_prefopt.export.trained_weights import TrainedWeights, read_trained_weights
from lit_prefopt.families.lora_prefixes import DENOISER
from lit_prefopt.weights.lora_files import read_lora
from lit_prefopt.weights.merge import merge_lora


def attach_negative(backbone: Backbone, source: str, merge: float = 0.0) -> None:
    """Load a negative model into a backbone, whose guidance then points away from it.

    It is added to the backbone's own denoiser, so that both branches stay alike: its weights are
    those of the denoiser, moved by `merge` towards the base, plus what the negative training has
    changed. A LoRA is what it has changed; of a whole denoiser the base is subtracted.

    Args:
        backbone: The backbone that is sampled, with its weights.
        source: LoRA file, denoiser's folder, checkpoint, or folder of a run that was trained with
            `--model.swapped true`.
        merge: 0 adds it to the denoiser as it is (released default), 1 to the base.

    Raises:
        InputError: The backbone has no such branch, or the weights do not fit.
    """
    check_number("negative_merge", merge, 0, 1)
    if not isinstance(backbone, LatentBackbone) or backbone.takes_guidance:
        raise InputError(
            f"{type(backbone).__name__} samples without a branch that has no prompt, so that a "
            "negative model has no place in it: leave `negative` out."
        )
    if backbone.policy.adapter:
        raise InputError(
            "The backbone has a LoRA to be trained, and a negative model is for sampling: take a "
            "backbone without `lora`."
        )
    backbone.policy.negative = freeze(_network(backbone, read_trained_weights(source), merge))


@torch.no_grad()
def _network(backbone: LatentBackbone, origin: TrainedWeights, merge: float) -> ModelMixin:
    """Return a copy of the backbone's denoiser with the negative weights added."""
    net = copy.deepcopy(backbone.policy.denoiser)
    if merge or origin.lora is None:
        # of a whole pipeline or a denoiser alone, the base is not known: it is the backbone's own
        named = origin.recipe.pretrained not in (None, origin.name)
        recipe = origin.recipe if named else Recipe(pretrained=backbone.pretrained)
        pipeline = BasePipeline.from_recipe(recipe)
        base = _base(pipeline, origin._replace(recipe=recipe)).state_dict()
        changed = base if origin.lora is not None else origin.load_denoiser(pipeline).state_dict()
        _check_alike(net.state_dict(), changed, origin.name)
        for name, weight in net.state_dict().items():
            if weight.is_floating_point():
                own, start = weight.float(), base[name].to(weight.device).float()
                moved = own + merge * (start - own)
                weight.copy_(moved + (changed[name].to(weight.device).float() - start))
    if origin.lora is not None:
        merge_lora(backbone.FAMILY, net, {}, origin.lora)
    return net


def _base(pipeline: BasePipeline, origin: TrainedWeights) -> Any:
    """Return the denoiser that the negative training started from."""
    base = origin._replace(lora=None, denoiser=None).load_denoiser(pipeline)
    if origin.recipe.start_lora is not None:
        start = read_lora(origin.recipe.start_lora)
        own = {key: layer for key, layer in start.layers.items() if key[0] == DENOISER}
        merge_lora(pipeline.family, base, {}, start._replace(layers=own))
    return base


def _check_alike(own: dict[str, Any], other: dict[str, Any], name: str) -> None:
    """Check that two denoisers have the same weights by name and shape."""
    shapes = [{key: value.shape for key, value in state.items()} for state in (own, other)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{name} is no denoiser of the model that is sampled, whose weights have other names "
            "or shapes: name a negative model that was trained on the same base."
        )

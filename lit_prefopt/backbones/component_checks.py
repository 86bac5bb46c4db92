"""Check that components of a pipeline are of the kinds that the backbones compute with."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Scale

PADDING = 0.01
"""Share of a text encoder's tokens that may be padding without a word."""


def check_class(kind: Any, source: str, name: str) -> bool:
    """Check the class of a component, and return whether the source is the component itself.

    A diffusers class loads the configuration of another one without an error.

    Args:
        kind: The class that is loaded.
        source: Hub name or folder of the component or of a pipeline.
        name: The component's folder inside a pipeline.
    """
    own = _stated_class(kind, source, None)
    if own == kind.__name__:
        return True
    stated = _stated_class(kind, source, name) or own
    if stated not in (None, kind.__name__, f"Flax{kind.__name__}"):
        raise InputError(
            f"The {name} of {source} is a {stated!s:.80} and not a {kind.__name__}, the only class "
            "of it that is known: name one of that class."
        )
    return False


def _stated_class(kind: Any, source: str, subfolder: str | None) -> str | None:
    try:
        stated: str | None = kind.load_config(source, subfolder=subfolder).get("_class_name")
    except (OSError, ValueError):  # there is none; the loader reports it
        return None
    return stated


def check_unet(
    unet: UNet2DConditionModel, encoders: list[Any], source: str, family: str, addition: str | None
) -> None:
    """Check that a UNet fits the text encoders and the latents.

    Args:
        unet: The UNet.
        encoders: The text encoders; empty if they are not loaded.
        source: Hub name, folder or file of the UNet, for messages.
        family: Name of the backbone.
        addition: Additional conditioning of the family's UNets.
    """
    width = sum(encoder.config.hidden_size for encoder in encoders)
    expected = {"cross_attention_dim": width} if encoders else {}
    expected["addition_embed_type"] = addition
    _check_config("UNet", unet.config, expected, source, family)
    if unet.config.in_channels != unet.config.out_channels:
        raise InputError(
            f"The UNet of {source} has {unet.config.in_channels} input channels and "
            f"{unet.config.out_channels} output channels: an inpainting model cannot be "
            "trained; name a text-to-image model."
        )


def check_transformer(net: Any, expected: dict[str, Any], source: str, family: str) -> None:
    """Check that a transformer fits the text encoders and the latents.

    Args:
        net: The transformer.
        expected: Settings that its configuration must have, by name.
        source: Hub name, folder or file of it, for messages.
        family: Name of the backbone.
    """
    _check_config("transformer", net.config, expected, source, family)


def _check_config(
    denoiser: str, config: Any, expected: dict[str, Any], source: str, family: str
) -> None:
    for name, value in expected.items():
        stated = getattr(config, name)
        if stated != value and not (name == "cross_attention_dim" and stated == [value]):
            raise InputError(
                f"The {denoiser} of {source} has {name} {stated} where {family} and its text "
                f"encoders need {value}: it belongs to another family; name one of this family."
            )


def check_vae(config: Any, source: str, channels: int, scale: Scale = "factor") -> None:
    """Check that the latents of a VAE are scaled as the family's are, and fit the denoiser.

    Args:
        config: The VAE's configuration.
        source: Hub name, folder or file of it, for messages.
        channels: Number of channels that the denoiser needs.
        scale: How the family's latents are scaled.
    """
    if scale in ("factor", "shift"):
        _check_factor(config, source, shift=scale == "shift")
    elif scale == "channel":
        _check_statistics(config, source)
    found = config.z_dim if scale == "channel" else config.latent_channels
    if found != channels:
        raise InputError(
            f"The VAE of {source} has {found!r:.80} latent channels and the denoiser {channels}: "
            "they belong to different families; name the VAE of this one."
        )


def _check_statistics(config: Any, source: str) -> None:
    """Check mean and deviation of each channel."""
    means, deviations = config.latents_mean or (), config.latents_std or ()
    fit = len(means) == len(deviations) == config.z_dim
    if not fit or not all(0 < x < float("inf") for x in deviations):
        raise InputError(
            f"The VAE of {source} has {len(means)} numbers in latents_mean and {len(deviations)} "
            f"in latents_std: correct its config.json, with a mean and a deviation above 0 for "
            f"each of its {config.z_dim} channels."
        )


def _check_factor(config: Any, source: str, *, shift: bool) -> None:
    """Check that latents are scaled by one factor, after a shift where the family has one."""
    if config.latents_mean is not None or config.latents_std is not None:
        raise InputError(
            f"The VAE of {source} states a mean and a deviation of each latent channel "
            "(latents_mean, latents_std), as Playground v2.5 with its EDM noise, which is not "
            "supported: name a checkpoint whose VAE has only a scaling_factor."
        )
    if config.shift_factor and not shift:
        raise InputError(
            f"The VAE of {source} shifts its latents (shift_factor {config.shift_factor!r:.80}), "
            "as those of flow-matching models, which are not supported: name a checkpoint whose "
            "VAE has only a scaling_factor."
        )
    scale = config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise InputError(
            f"The VAE of {source} has the scaling_factor {scale!r:.80}: correct its config.json, "
            "with a number above 0 (0.18215 for Stable Diffusion, 0.13025 for SDXL)."
        )


def check_tokenizer(tokenizer: Any, vocabulary: int, source: str) -> None:
    """Check that a tokenizer has the vocabulary of its text encoder.

    transformers loads a tokenizer whose files are missing as one without words, which turns every
    prompt into the same tokens.

    Args:
        tokenizer: The tokenizer.
        vocabulary: Number of tokens that the text encoder embeds.
        source: Hub name, folder or file of both, for messages.
    """
    size = len(tokenizer)
    if not vocabulary * (1 - PADDING) <= size <= vocabulary:
        raise InputError(
            f"A tokenizer of {source} has {size} tokens and its text encoder {vocabulary}: copy "
            "the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) from the model "
            "that the text encoder belongs to."
        )

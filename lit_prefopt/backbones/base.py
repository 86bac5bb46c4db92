"""Interface of a model family, as methods use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_prefopt.backbones.guidance import Guidance
from lit_prefopt.backbones.policy import Policy
from lit_prefopt.backbones.start_weights import StartWeights
from lit_prefopt.conditioning import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Process
from lit_prefopt.processes.settings import Sampling


class Backbone(nn.Module, ABC):
    """Denoiser, VAE, text encoder and noise process of one model family.

    A subclass loads the networks in `__init__` and implements seven members:

    - `embed(texts)`, `encode(images)`, `decode(latents)`: text encoders and VAE;
    - `predict(latents, t, prompt)`: the denoiser, with the active network of `self.policy`;
    - `save(folder)`: write the trained weights;
    - `latent_shape`, `pixels_per_latent`: the size of latents.

    All other members have defaults. Policy and reference are switched here (`as_reference`); how
    the reference is stored is hidden from methods and subclasses.

    Args:
        policy: The trained denoiser and its reference.
        process: The noise process: noising, target of the denoiser, reverse steps.
    """

    GUIDANCE: Guidance = Guidance()
    """Convention of classifier-free guidance."""

    EMPTY: ClassVar[str] = ""
    """Text whose embedding is the empty prompt, which classifier-free guidance points away from."""

    start: StartWeights | None = None  # where the trained denoiser was loaded from

    def __init__(self, policy: Policy, process: Process) -> None:
        super().__init__()
        self.policy = policy
        self.process = process
        self._empty: Prompt | None = None

    @abstractmethod
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts."""

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents of images (B, 3, H, W) in [-1, 1]."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation before scaling, in the VAE's precision, to be cached."""
        return self.encode(images)

    def scaled(self, means: Tensor) -> Tensor:
        """Scale means of `posterior` as the denoiser expects latents, float32."""
        return means.float()

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations of `posterior` as those of the denoiser's latents, float32.

        It differs from `scaled` where a family shifts its latents: a shift changes no deviation.
        """
        return deviations.float()

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision of the latents that `posterior` returns."""
        return torch.float32

    @property
    def has_encoders(self) -> bool:
        """Whether VAE and text encoders are loaded."""
        return True

    def require_encoders(self, who: str) -> None:
        """Check that VAE and text encoders are loaded.

        Args:
            who: What needs them, the subject of the message.

        Raises:
            InputError: They are not loaded.
        """
        if not self.has_encoders:
            raise InputError(
                f"{who} needs the VAE and the text encoders, which the recipe leaves out: set "
                "`--backbone.encoders true`."
            )

    @property
    def has_denoiser(self) -> bool:
        """Whether the denoiser's weights are loaded."""
        return True

    def require_denoiser(self, who: str) -> None:
        """Check that the denoiser's weights are loaded.

        Args:
            who: What needs them, the subject of the message.

        Raises:
            InputError: They are not loaded.
        """
        if not self.has_denoiser:
            raise InputError(
                f"{who} needs the denoiser's weights, which the recipe leaves out: set "
                "`--backbone.denoiser_weights true`."
            )

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """VAE and text encoders by name; empty if they are not loaded."""
        others = ("policy", "process")
        return {name: part for name, part in self.named_children() if name not in others}

    def latent_settings(self) -> dict[str, Any]:
        """Return the settings of latents and prompts that the denoiser requires, by name.

        Cached pairs with other settings are refused. `text` is the width of every text tensor by
        name (None: not checked); `tokens` is their number, where the family fixes it. A family
        that depends on more adds names of its own.
        """
        return {
            "latent_channels": self.latent_shape[0],
            "pixels_per_latent": self.pixels_per_latent,
            "scaling_factor": None,
            "shift_factor": None,
            "text": None,
            "tokens": None,
        }

    def reference_settings(self) -> dict[str, Any]:
        """Return the settings that determine the reference's errors, by name."""
        return {
            "reference": self.policy.reference_fingerprint(),
            "process": self.process.settings(),
        }

    @property
    def checkpoint(self) -> str:
        """Name of the weights, for messages."""
        return type(self).__name__

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the prediction of the policy (inside `as_reference`: of the reference).

        Args:
            latents: Noised latents, (B, C, H, W).
            t: Noise levels of the process, (B,).
            prompt: B embedded prompts.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents (B, C, H, W) to images (B, 3, H, W) in [-1, 1]."""

    def preview(self, latents: Tensor) -> Tensor:
        """Decode latents for a judge; a family may have a faster decoder than `decode`."""
        return self.decode(latents)

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the trained weights in diffusers' layout, and return the path."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the checkpoint's native size."""

    @property
    @abstractmethod
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, along each side."""

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of images are multiples of."""
        return self.pixels_per_latent

    @property
    def largest_side(self) -> int | None:
        """Largest side of images in pixels, if there is one."""
        return None

    @property
    def sizes(self) -> str:
        """Sides that images can have, for messages."""
        most = "" if self.largest_side is None else f" up to {self.largest_side}"
        return f"a multiple of {self.size_multiple}{most}"

    def has_size(self, height: int, width: int) -> bool:
        """Whether images can have a size in pixels."""
        fits = self.largest_side is None or max(height, width) <= self.largest_side
        return fits and not (height % self.size_multiple or width % self.size_multiple)

    def sampling_shape(self, how: Sampling) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of a sampled image.

        Args:
            how: Sampling settings with the image size; the checkpoint's native size if not given.

        Raises:
            InputError: The latents cannot have that size.
        """
        channels, *own = self.latent_shape
        unit = self.pixels_per_latent
        height, width = how.height or unit * own[0], how.width or unit * own[1]
        if not self.has_size(height, width):
            raise InputError(
                f"Images of {width} x {height} pixels cannot be sampled: set width and height of "
                f"`sampling` to {self.sizes}."
            )
        return channels, height // unit, width // unit

    def fits_context(self, text: str) -> bool:
        """Whether a prompt fits the context of the text encoders; True by default."""
        return True

    @property
    def empty(self) -> Prompt:
        """The empty prompt, one row: embedded once, since text encoders are frozen."""
        if self._empty is None:
            with torch.inference_mode(False), torch.no_grad():  # it may be used in training later
                self._empty = self.embed([self.EMPTY])
        return self._empty

    @property
    def sampling(self) -> Sampling:
        """Default sampling settings of the family."""
        return Sampling()

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale conditions the denoiser, so that one forward is enough."""
        return False

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference."""
        return self.policy.has_reference

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Use the reference weights in `predict` inside the block, without gradients."""
        with torch.no_grad(), self.policy.as_reference():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move to another device or precision, and re-embed the empty prompt there."""
        if self._empty is not None:
            self._empty = None if self.has_encoders else self._empty.map(fn)
        return super()._apply(fn, recurse)

    def set_empty_prompt(self, prompt: Prompt) -> None:
        """Set the empty prompt, one row, as it was embedded elsewhere."""
        device = next(self.policy.parameters()).device
        self._empty = prompt.to(device)

    def freeze(self) -> None:
        """Freeze all parameters and drop the reference, for inference only."""
        self.policy.drop_reference()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set the policy's mode; frozen networks stay in evaluation mode."""
        super().train(False)
        self.policy.train(mode)
        return self


def check_backbone(backbone: object) -> None:
    """Check that a recipe names a backbone.

    Args:
        backbone: Object built from the recipe's key `backbone`.
    """
    if not isinstance(backbone, Backbone):
        raise InputError(
            "The recipe names no backbone: give one by `--backbone backbone/sd15.yaml`, or a "
            "class with its arguments."
        )

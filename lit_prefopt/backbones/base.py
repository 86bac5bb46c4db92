"""What a method may ask of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.backbones.policy import Policy
from lit_prefopt.batches import Prompt
from lit_prefopt.errors import InputError
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.fingerprint import fingerprint


class Backbone(nn.Module, ABC):
    """Denoiser, VAE, text encoder and noise process of one model family.

    A subclass loads the parts in `__init__` and speaks five sentences: `embed`, `encode`,
    `predict`, `decode`, `save`. Which network `predict` asks, policy or reference, is settled
    here, and what the reference is made of nobody else needs to know.

    Args:
        policy: The trained denoiser and its reference.
        process: What noising and the denoiser's target are.
    """

    def __init__(self, policy: Policy, process: DiscreteProcess) -> None:
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
        """Return what `encode` returns before `scaled`, in the VAE's precision, to be kept."""
        return self.encode(images)

    def scaled(self, latents: Tensor) -> Tensor:
        """Return what `posterior` returned at the denoiser's scale, float32."""
        return latents.float()

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision of what `posterior` returns."""
        return torch.float32

    @property
    def has_encoders(self) -> bool:
        """Whether images and texts can be encoded, and latents decoded."""
        return True

    def require_encoders(self, who: str) -> None:
        """Refuse what needs the VAE and the text encoders, where they are not loaded.

        Args:
            who: The subject of the sentence.
        """
        if not self.has_encoders:
            raise InputError(
                f"{who} needs the VAE and the text encoders, which the recipe leaves out: set "
                "`--backbone.encoders true`."
            )

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """All that images and texts go through, by name; nothing where it is not loaded."""
        others = ("policy", "process")
        return {name: part for name, part in self.named_children() if name not in others}

    def latent_settings(self) -> dict[str, Any]:
        """Return what latents and prompts must have in common with the denoiser, by name."""
        return {
            "latent_channels": self.latent_shape[0],
            "pixels_per_latent": self.pixels_per_latent,
            "scaling_factor": None,
            "prompt_width": None,
            "pooled_width": None,
        }

    def reference_settings(self) -> dict[str, Any]:
        """Return what decides the errors of the reference, or of what training starts from."""
        return {
            "reference": fingerprint(self.policy.reference_weights),
            "process": self.process.settings(),
        }

    @property
    def checkpoint(self) -> str:
        """What the weights are called, for messages."""
        return type(self).__name__

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return what the policy (or, inside `as_reference`, the reference) says.

        Args:
            latents: Noised latents, (B, C, H, W).
            t: Timesteps, (B,).
            prompt: B embedded prompts.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of clean latents (B, C, H, W)."""

    def preview(self, latents: Tensor) -> Tensor:
        """Return images for a judge's eyes alone; a family may have a quicker way than `decode`."""
        return self.decode(latents)

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the trained weights in diffusers' layout and return where they lie."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents at the size that the checkpoint was made for."""

    @property
    @abstractmethod
    def pixels_per_latent(self) -> int:
        """How many pixels of an image one side of a latent stands for."""

    def sampling_shape(self, how: Sampling) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of images of the size that is asked for.

        Args:
            how: Names the size, or leaves it to the checkpoint.

        Raises:
            InputError: The latents cannot have that size.
        """
        channels, *own = self.latent_shape
        unit = self.pixels_per_latent
        height, width = how.height or unit * own[0], how.width or unit * own[1]
        if height % unit or width % unit:
            raise InputError(
                f"Images of {width} x {height} pixels cannot be sampled: set width and height of "
                f"`sampling` to multiples of {unit}."
            )
        return channels, height // unit, width // unit

    def fits_context(self, text: str) -> bool:
        """Whether a prompt is embedded to its end; here nothing is known of a limit."""
        return True

    @property
    def empty(self) -> Prompt:
        """The empty prompt, one row: embedded once, since all that embeds it is frozen."""
        if self._empty is None:
            with torch.inference_mode(False), torch.no_grad():  # it may serve in training later
                self._empty = self.embed([""])
        return self._empty

    @property
    def sampling(self) -> Sampling:
        """How this family's images are sampled where nothing else is said."""
        return Sampling()

    @property
    def takes_guidance(self) -> bool:
        """Whether the denoiser is told the guidance scale, so that one forward is enough."""
        return False

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to hold the policy back."""
        return self.policy.has_reference

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Let `predict` speak for the reference inside the block, without gradients."""
        with torch.no_grad(), self.policy.as_reference():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move to another device or precision, where the empty prompt is embedded anew."""
        if self._empty is not None:
            self._empty = None if self.has_encoders else _mapped(fn, self._empty)
        return super()._apply(fn, recurse)

    def set_empty_prompt(self, prompt: Prompt) -> None:
        """Take the empty prompt as it was embedded elsewhere, one row."""
        device = next(self.policy.parameters()).device
        self._empty = _mapped(lambda field: field.to(device), prompt)

    def freeze(self) -> None:
        """Let nothing be trained, for those who only listen; there is no reference then."""
        self.policy.drop_reference()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set the policy's mode; all that is frozen stays in evaluation."""
        super().train(False)
        self.policy.train(mode)
        return self


def _mapped(fn: Callable[[Tensor], Tensor], prompt: Prompt) -> Prompt:
    return Prompt(*(None if f is None else fn(f) for f in prompt))  # type: ignore[arg-type]


def check_backbone(backbone: object) -> None:
    """Refuse what a recipe without a backbone hands over.

    Args:
        backbone: What was built of the recipe's key `backbone`.
    """
    if not isinstance(backbone, Backbone):
        raise InputError(
            "The recipe names no backbone: give one by `--backbone backbone/sd15.yaml`, or a "
            "class with its arguments."
        )

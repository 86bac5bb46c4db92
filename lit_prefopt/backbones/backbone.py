"""What a method may ask of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_prefopt.backbones.reference import Policy
from lit_prefopt.batches import Prompt
from lit_prefopt.diffusion.process import DiscreteProcess
from lit_prefopt.diffusion.settings import Sampling
from lit_prefopt.errors import InputError


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

    def canvas(self, how: Sampling) -> tuple[int, int, int]:
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

    def reads(self, text: str) -> bool:
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
        self._empty = None
        return super()._apply(fn, recurse)

    def freeze(self) -> None:
        """Let nothing be trained, for those who only listen; there is no reference then."""
        self.policy.drop_reference()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set the policy's mode; all that is frozen stays in evaluation."""
        super().train(False)
        self.policy.train(mode)
        return self


def check_backbone(backbone: object) -> None:
    """Refuse what a recipe without a backbone hands over.

    Args:
        backbone: What was built of the recipe's key `backbone`.
    """
    if not isinstance(backbone, Backbone):
        raise InputError(
            "The recipe names no backbone: give one by `--backbone backbone/toy.yaml`, or a "
            "class with its arguments."
        )

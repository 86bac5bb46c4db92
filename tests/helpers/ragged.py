"""A very small family whose prompts have lengths of their own, and whose latents are shifted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.backbones.policy import Policy, freeze
from lit_prefopt.conditioning import Prompt, Ragged
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.utils.seeds import stable_seed
from tests.helpers.schedules import SD15

SCALE, SHIFT, WORDS = 0.5, 0.3, 50


class Net(nn.Module):
    """A convolution, moved by the mean of a caption's words and the pooled text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.words, self.pooled = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(
        self, latents: Tensor, t: Tensor, rows: Tensor, mask: Tensor, pooled: Tensor
    ) -> Any:
        """Return the prediction; rows beyond the mask are not used."""
        words = self.words(rows.float()) * mask[..., None]
        mean = words.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        moved = (mean + self.pooled(pooled)) * t.float()[:, None].cos()
        return self.conv(latents) + moved[..., None, None]


class RaggedBackbone(Backbone):
    """One row for each word of a prompt, none for the empty prompt, and a pooled embedding.

    Args:
        encoders: Have a VAE and an embedding of words.
    """

    def __init__(self, encoders: bool = True) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net()
            vae, words = nn.Conv2d(3, 4, 4, stride=4), nn.Embedding(WORDS, 6)
        process = DiscreteProcess({**SD15, "prediction_type": "epsilon"})
        super().__init__(Policy(net, freeze(copy.deepcopy(net))), process)
        self.vae = freeze(vae) if encoders else None
        self.words = freeze(words.bfloat16()) if encoders else None

    @property
    def has_encoders(self) -> bool:
        """Whether there are a VAE and an embedding of words."""
        return self.vae is not None

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Prompt:
        """Embed B prompts."""
        self.require_encoders("Embedding prompts")
        split = [text.split() for text in texts]
        numbers = [stable_seed("word", word) % WORDS for words in split for word in words]
        ids = torch.tensor(numbers, dtype=torch.int64, device=self.words.weight.device)
        caption = Ragged(self.words(ids), tuple(len(words) for words in split))
        pooled = [row.float().sum(0)[:3] for row in caption]
        return Prompt({"caption": caption, "pooled": torch.stack(pooled)})

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation at the VAE's own scale."""
        mean = self.vae(images)
        return mean, mean.abs() / 10 + 0.1

    def scaled(self, means: Tensor) -> Tensor:
        """Shift and scale means."""
        return (means.float() - SHIFT) * SCALE

    def scaled_deviation(self, deviations: Tensor) -> Tensor:
        """Scale deviations."""
        return deviations.float() * SCALE

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents of images."""
        mean, deviation = self.posterior(images)
        return self.scaled(mean), self.scaled_deviation(deviation)

    def predict(self, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """Return the active network's prediction."""
        return self.policy.net(latents, t, *prompt.ragged("caption").padded(), prompt["pooled"])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images."""
        images = (latents[:, :3] / SCALE + SHIFT).clamp(-1, 1)
        return nn.functional.interpolate(images, scale_factor=4)

    def save(self, folder: Path) -> Path:
        """Write the trained weights."""
        save_file(self.policy.denoiser.state_dict(), folder / "net.safetensors")
        return folder / "net.safetensors"

    def latent_settings(self) -> dict[str, Any]:
        """Return what a cache must have."""
        own = {"scaling_factor": SCALE, "shift_factor": SHIFT, "text": {"caption": 6, "pooled": 3}}
        return super().latent_settings() | own

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of latents at the native size."""
        return 4, 8, 8

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a latent, along each side."""
        return 4

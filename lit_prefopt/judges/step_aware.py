"""Step-aware preference model of SPO (arXiv 2406.04314): a CLIP conditioned on the timestep."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lit_prefopt.errors import InputError
from lit_prefopt.judges.clip import CLIPJudge, clip_loading_errors, load_clip
from lit_prefopt.judges.weights import fill, read_weights, version

FREQUENCIES = 256
"""Width of the sinusoidal embedding of a timestep."""


class StepAwareCLIP(CLIPModel):
    """A CLIP whose vision blocks are shifted, scaled and gated by the timestep (AdaLN).

    At initialization it equals the original CLIP: gates are 1 and all else is 0.

    Args:
        config: Configuration of the CLIP.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        vision, width = self.vision_model, config.vision_config.hidden_size
        layers = [ModulatedLayer(vision.config) for _ in vision.encoder.layers]
        vision.encoder.layers = nn.ModuleList(layers)
        vision.adaLN_modulation = _modulation(width, 2)
        self.t_embedder = TimestepEmbedder(width)

    @classmethod
    def start_from(cls, clip: CLIPModel) -> StepAwareCLIP:
        """Return a step-aware model with the CLIP's outputs at every timestep."""
        model = cls(clip.config)
        model.load_state_dict(clip.state_dict(), strict=False)
        return model

    def get_image_features(self, pixel_values: Tensor, t: Tensor) -> Tensor:
        """Return the image embeddings, (B, D).

        Args:
            pixel_values: (B, 3, S, S), normalised.
            t: Timesteps, (B,); 0 for clean images.
        """
        time = self.t_embedder(t)
        pooled = self.vision_model(pixel_values, time=time).pooler_output
        last: Any = self.vision_model.adaLN_modulation
        shift, scale = last(time).chunk(2, dim=-1)
        return self.visual_projection(pooled * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    """Embed a timestep as the vector that modulates all blocks.

    Args:
        width: Width of the vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: tuple[Any, ...] = (
            nn.Linear(FREQUENCIES, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(*layers)

    def forward(self, t: Tensor) -> Tensor:
        """Return one vector per timestep, (B, width)."""
        # cosine first, divisor half: as in the training of the published weights
        waves = get_timestep_embedding(t, FREQUENCIES, True, downscale_freq_shift=0)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class ModulatedLayer(CLIPEncoderLayer):
    """A block of the vision tower modulated by the timestep, as in DiT.

    Args:
        config: Configuration of the vision tower.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adaLN_modulation = _modulation(self.embed_dim, 6, gates=(2, 5))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, time: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the block's output, (B, N, width).

        Args:
            hidden_states: (B, N, width).
            attention_mask: None in a vision tower.
            time: The timestep's vector, (B, width).
            kwargs: Further arguments of transformers' attention.
        """
        spoken = self.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
        shift, scale, gate = spoken[:3]
        seen = self.layer_norm1(hidden_states) * (1 + scale) + shift
        attended, _ = self.self_attn(hidden_states=seen, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + gate * attended
        shift, scale, gate = spoken[3:]
        seen = self.layer_norm2(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.mlp(seen)


class StepAware(CLIPJudge):
    """Scores predictions of the clean image, conditioned on their timestep.

    Args:
        weights: The published .bin file or a .safetensors file; without it, the plain CLIP at
            every timestep.
        pretrained: Hub name or folder of the CLIP that it was trained from.
        processor: Hub name or folder of its image processor and tokenizer.
        batch_size: Images scored at a time.
    """

    crop = "tensor"  # as the published model was trained

    def __init__(
        self,
        weights: str | None = None,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: int = 16,
    ) -> None:
        super().__init__(pretrained, processor, batch_size)
        if weights is not None and not Path(weights).is_file():
            raise InputError(
                f"There is no file {weights}: name the step-aware model's weights, which "
                "huggingface.co/SPO-Diffusion-Models/Step-Aware_Preference_Models has."
            )
        self.weights = weights

    @cached_property
    def clip(self) -> StepAwareCLIP:
        """The model, loaded on first access."""
        if self.weights is None:
            model = StepAwareCLIP.start_from(load_clip(self.pretrained))
        else:
            with clip_loading_errors(self.pretrained, "CLIP"):
                config = CLIPConfig.from_pretrained(self.pretrained, trust_remote_code=False)
            model = StepAwareCLIP(config)
            load_published(model, Path(self.weights))
        return model.eval().requires_grad_(False)

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        return super().versions() if self.weights is None else {self.weights: version(self.weights)}

    def image_features(self, images: Tensor, t: Tensor | None) -> Tensor:
        """Return the image embeddings, (B, D); without t for clean images."""
        t = torch.zeros(len(images), device=images.device) if t is None else t.to(images.device)
        return self.clip.get_image_features(self.pixels(images), t)


def load_published(model: StepAwareCLIP, file: Path) -> None:
    """Load the weights of a published file strictly.

    Args:
        model: Of the same size.
        file: A .bin file (read without unpickling code) or a .safetensors file; keys may begin
            with `model.`.

    Raises:
        InputError: The file is not of that layout or size.
    """
    state = {name.removeprefix("model."): value for name, value in read_weights(file).items()}
    # older versions of transformers also stored the position ids
    state = {name: v for name, v in state.items() if not name.endswith("position_ids")}
    cure = "name the CLIP that it was trained from as `pretrained`"
    fill(model, state, file, "a step-aware model of this size", cure)


def _modulation(width: int, times: int, gates: tuple[int, ...] = ()) -> nn.Sequential:
    """Return SiLU and a linear layer initialized to open gates and zero shift and scale."""
    linear = nn.Linear(width, times * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    with torch.no_grad():
        for gate in gates:
            linear.bias[gate * width : (gate + 1) * width] = 1
    return nn.Sequential(nn.SiLU(), linear)

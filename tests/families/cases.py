"""A small pipeline of a flow family, and how its stock pipeline is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.processes.settings import Sampling
from tests.helpers.recorder import Recorder, parts_of

LONG = "a very long prompt that fits into no text encoder, " * 8  # 408 letters
TEXTS = ["a cat", "A red cube, left of a blue ball; 35mm", LONG]
STEPS = 4


def load_stock(folder: Path, **options: Any) -> DiffusionPipeline:
    """Load a stock pipeline without a progress bar.

    Args:
        folder: Its folder.
        options: Further arguments of `from_pretrained`, such as `torch_dtype`.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Models(NamedTuple):
    """Ours and the stock pipeline of the same folder."""

    case: Case
    backbone: TransformerBackbone
    stock: DiffusionPipeline


@dataclass(frozen=True)
class Case:
    """A small pipeline of a family.

    Args:
        backbone: Its class.
        write: Writes the pipeline to a folder and returns the folder.
        options: Options of the backbone.
        load: Loads the stock pipeline of the folder, with arguments of `from_pretrained`.
        arguments: Arguments of the stock call for a guidance scale, besides prompts, steps and
            size: given the models and the number of prompts, with a negative prompt embedded once
            where the family has one, as `backbone.empty` is.
        start: Returns the stock pipeline's `latents` for ours, (B, C, h, w).
        unguided: Scale without guidance.
        guided: A scale with it.
        calls: Calls of the transformer per guided step.
        time: Name of the transformer's argument for the time.
        sizes: Height and width of a square and of another image, in pixels.
    """

    backbone: type[TransformerBackbone]
    write: Callable[[Path], Path]
    arguments: Callable[[Models, int, float], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    load: Callable[..., DiffusionPipeline] = load_stock
    start: Callable[[Tensor], Tensor] = lambda latents: latents
    unguided: float = 1.0
    guided: float = 7.0
    calls: int = 1
    time: str = "timestep"
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((32, 32), (40, 24))

    def ours(self, folder: Path, **options: Any) -> TransformerBackbone:
        """Load our backbone; a LoRA starts from the same weights each time.

        Args:
            folder: Where `write` wrote the pipeline.
            options: Further options of the backbone.
        """
        torch.manual_seed(0)
        return self.backbone(str(folder), **self.options | options)

    def arguments_of(self, folder: Path) -> list[str]:
        """Return the arguments of the command line that name the backbone.

        Args:
            folder: Where `write` wrote the pipeline.
        """
        own = [f"--backbone.{name}={json.dumps(value)}" for name, value in self.options.items()]
        return ["--backbone", self.backbone.__name__, "--backbone.pretrained", str(folder), *own]

    def models(self, folder: Path, **options: Any) -> Models:
        """Load ours and the stock pipeline.

        Args:
            folder: Where `write` wrote the pipeline.
            options: Further options of the backbone.
        """
        return Models(self, self.ours(folder, **options), self.load(folder))


class Recorded(NamedTuple):
    """Recordings of both, and the images in [0, 1]."""

    ours: Recorder
    theirs: Recorder
    images: Tensor
    expected: Tensor


def sampled(
    models: Models, texts: list[str], guidance: float, size: tuple[int, int] | None = None
) -> Recorded:
    """Record how both sample the same images.

    Args:
        models: The models.
        texts: B prompts.
        guidance: Guidance scale.
        size: Height and width in pixels; the case's square if not given.
    """
    case, backbone, stock = models
    height, width = size or case.sizes[0]
    seeds = torch.arange(5, 5 + len(texts))
    how = Sampling(STEPS, guidance, batch_size=len(texts), height=height, width=width)
    parts = {"transformer": (backbone.policy.denoiser, "forward")}
    parts |= {name: (text.network, "forward") for name, text in backbone.texts.items()}
    parts["vae.decode"] = backbone.vae, "decode"
    with Recorder(parts, ends_step="transformer") as ours:
        images = sample(backbone, texts, seeds, how)
    latents = draws.normal(seeds, backbone.sampling_shape(how), "start")
    with Recorder(parts_of(stock), ends_step="transformer") as theirs:
        expected = stock(
            prompt=[*texts],  # Z-Image writes into the list
            num_inference_steps=STEPS,
            latents=case.start(latents).to(stock.dtype),
            output_type="pt",
            height=height,
            width=width,
            **case.arguments(models, len(texts), guidance),
        ).images
    calls = STEPS * (1 if guidance == case.unguided else case.calls)
    assert len(ours.of("transformer")) == len(theirs.of("transformer")) == calls
    return Recorded(ours, theirs, (images + 1) / 2, expected)

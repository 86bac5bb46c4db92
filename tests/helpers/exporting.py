"""Pipelines and LoRA files with random weights, and exports of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from lit_prefopt import families
from lit_prefopt.cli import main

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

EVERYWHERE = [*ATTENTION, "conv1", "conv2", "time_emb_proj", "proj_in", "ff.net.0.proj", "conv"]


class Family(NamedTuple):
    """A model family: its pipeline's class and the folder of a tiny one."""

    kind: type[DiffusionPipeline]
    folder: str

    @property
    def names(self) -> families.Family:
        """Names of its components and weights."""
        return families.family_of(self.kind.__name__, self.folder)

    def pipeline(self, lora: Path | None = None) -> DiffusionPipeline:
        """Return the stock pipeline, with a LoRA loaded as its users load it."""
        pipeline = copy.deepcopy(_stock(self.kind, self.folder))
        if lora is not None:
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        return pipeline


@functools.cache
def _stock(kind: type[DiffusionPipeline], folder: str) -> DiffusionPipeline:
    """Return a pipeline that is read once."""
    extra = {"safety_checker": None} if kind is StableDiffusionPipeline else {}
    pipeline = kind.from_pretrained(folder, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> Family:
    """Stable Diffusion 1.x, then SDXL."""
    if request.param == "sd":
        return Family(StableDiffusionPipeline, request.getfixturevalue("tiny_folder"))
    return Family(StableDiffusionXLPipeline, request.getfixturevalue("tiny_xl_folder"))


def add_random_adapter(net: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Add a LoRA that changes what the network says."""
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def write_lora(
    family: Family,
    folder: Path,
    rank: int = 4,
    alpha: float = 6,
    targets: list[str] = ATTENTION,
    text: bool = False,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = convert_state_dict_to_diffusers,
) -> Path:
    """Write a random LoRA as diffusers' own training scripts do, and return the file."""
    pipeline = family.pipeline()
    parts = {"unet": pipeline.unet}
    add_random_adapter(pipeline.unet, rank, alpha, targets)
    if text:
        names = [n for n in ("text_encoder", "text_encoder_2") if hasattr(pipeline, n)]
        parts |= {name: getattr(pipeline, name) for name in names}
        for name in names:
            add_random_adapter(parts[name], rank, alpha, ["q_proj", "out_proj", "fc1"])
    layers = {
        f"{name}_lora_layers": convert(get_peft_model_state_dict(net))
        for name, net in parts.items()
    }
    family.kind.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def prediction(pipeline: DiffusionPipeline) -> Tensor:
    """Return what the UNet says of fixed noise."""
    generator = torch.Generator().manual_seed(1)
    unet = pipeline.unet
    hidden = torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 20, generator=generator)}
    added["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return unet(latents, torch.tensor([3, 700]), hidden, added_cond_kwargs=added).sample


def picture(pipeline: DiffusionPipeline) -> Tensor:
    """Return an image by the pipeline's own hand, (height, width, 3)."""
    generator = torch.Generator().manual_seed(2)
    out = pipeline(
        prompt="a fox",
        num_inference_steps=3,
        generator=generator,
        output_type="np",
        height=32,
        width=32,
    )
    return torch.from_numpy(out.images[0])


def export(source: Path, to: str, output: Path, *more: str) -> Path:
    """Run the command and return what it wrote."""
    main(["export", "--source", str(source), "--to", to, "--output", str(output), *more])
    return output


def metadata(file: Path) -> dict[str, str]:
    """The file's plain facts."""
    with safe_open(file, "pt") as stream:
        return stream.metadata()


def refused(*args: object) -> str:
    """What the command says when it refuses."""
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, args)])
    return str(stop.value)

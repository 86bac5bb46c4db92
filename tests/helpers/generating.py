"""Generated pairs of the tiny pipeline, and readers of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
)
from lightning import Trainer

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.datamodules import PromptGroups
from lit_prefopt.generate import (
    DiptychGenerator,
    MisspeltText,
)
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import Prompts


def controlnet(backbone: StableDiffusion, folder: Path) -> str:
    """A ControlNet of the UNet's form whose output is not zero, as a fresh one's would be."""
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(
        backbone.policy.denoiser, conditioning_embedding_out_channels=(8, 8, 8)
    )
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    net.save_pretrained(folder)
    return str(folder)


HOW = Sampling(steps=2, guidance=2.0, eta=1.0, batch_size=4)

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

TEXTS = ['"A1"', "nothing", '"BO"', '"CAT"', f'"{"long" * 20}"']


class Texts(Prompts):
    """A list of prompts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.list = [*texts]

    def texts(self) -> list[str]:
        return self.list


def generate(folder: str, output: Path, **options: object) -> list[Sample]:
    """Return what is written for the prompts above."""
    settings = {"corruption": MisspeltText(), "template": "{left}|{right}", "sampling": HOW}
    backbone = StableDiffusion(folder, reference="none")
    model = DiptychGenerator(backbone, str(output), **settings | options)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], **QUIET)
    trainer.predict(
        model, PromptGroups(Texts(TEXTS), group_size=3, seed=1), return_predictions=False
    )
    reader = ShardReader(read_index(str(output)))
    return [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path) -> list[Sample]:
    """Return what the shards hold."""
    reader = ShardReader(read_index(str(folder)))
    return [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]

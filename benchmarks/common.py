"""Shared by all benchmarks: full-size pipelines with random weights, and dated reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.toy.assemble import SCHEDULER, save_pipeline
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

REPORTS = Path(__file__).parent / "reports"
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "webdataset")


FULL_SIZE_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
VIT_H_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make all weights in this precision inside the block: a full-size model fits only once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_sd15(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a pipeline of Stable Diffusion 1.5's full size with random weights, once."""
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "made-from", length=77)
    with default_dtype(dtype):
        vae = AutoencoderKL(**FULL_SIZE_VAE, sample_size=512)
        text = CLIPTextModel(tiny_text_config(tokenizer, **CLIP_L))
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    save_pipeline(folder, vae, text, tokenizer, unet, DDIMScheduler(**SCHEDULER))
    return folder


def random_sdxl(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a pipeline of SDXL's full size with random weights, once."""
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizers = [
        tiny_tokenizer(folder / "made-from", length=77, **options)
        for options in ({}, {"pad_token": "!"})
    ]
    with default_dtype(dtype):
        StableDiffusionXLPipeline(
            vae=AutoencoderKL(**FULL_SIZE_VAE, sample_size=1024, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizers[0], **CLIP_L)),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizers[1], **CLIP_G)),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel(**SDXL_UNET),
            scheduler=DDIMScheduler(**SCHEDULER),
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def random_shards(folder: Path, pairs: int, side: int) -> Path:
    """Write shards of pairs of JPEGs, smooth pictures with some grain, once."""
    if (folder / "index.json").is_file():
        return folder
    random = np.random.default_rng(0)
    with ShardWriter(folder, image_format="jpg") as writer:
        for pair in range(pairs):
            small = random.integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
            grain = random.normal(0, 8, (side, side, 1))
            sides = [
                Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in small
            ]
            chosen, rejected = ((np.asarray(s) + grain).clip(0, 255).astype("u1") for s in sides)
            writer.add(f"picture {pair}", chosen, rejected)
    return folder


def hardware() -> str:
    """Return the name of the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"CPU, {os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def write_report(
    name: str, text: str, variant: str = "", path: Path | None = None, reports: Path = REPORTS
) -> Path:
    """Write a report with all that is needed to repeat it.

    Args:
        name: The script's name.
        text: The figures.
        variant: Distinguishes several reports of one script and day.
        path: Output file; by default a dated one in `reports`.
        reports: The folder of dated reports, in the package of the script.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    command = " ".join(["python", "-m", f"{reports.parent.name}.{name}", *sys.argv[1:]])
    head = [
        f"# {name}",
        "",
        f"- date: {date.today()}",
        f"- commit: {commit or 'a copy of the files alone'}",
        f"- hardware: {hardware()}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- command: `{command}`",
        "",
    ]
    named = "-".join(filter(None, (str(date.today()), name, variant)))
    path = path or reports / f"{named}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, text.rstrip(), ""]))
    return path

"""What every benchmark needs: full-size pipelines with random weights, and dated reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lit_prefopt.toy.assemble import SCHEDULER, save_pipeline
from tests.tiny import tiny_tokenizer

REPORTS = Path(__file__).parent / "reports"
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "webdataset")


def random_sd15(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a pipeline of Stable Diffusion 1.5's full size with random weights, once."""
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "made-from", length=77)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    parts = (vae.to(dtype), CLIPTextModel(text).to(dtype), tokenizer, unet.to(dtype))
    save_pipeline(folder, *parts, DDIMScheduler(**SCHEDULER))
    return folder


def hardware() -> str:
    """Return the device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"CPU, {os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def write_report(name: str, text: str) -> Path:
    """Write a report with all that is needed to repeat it."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    command = " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    head = [
        f"# {name}",
        "",
        f"- date: {date.today()}",
        f"- commit: {commit}",
        f"- hardware: {hardware()}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- command: `{command}`",
        "",
    ]
    path = REPORTS / f"{date.today()}-{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*head, text.rstrip(), ""]))
    return path

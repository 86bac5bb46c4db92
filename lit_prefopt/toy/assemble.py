"""Assemble the components of the toy trainings into a Stable Diffusion folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jsonargparse import auto_cli
from transformers import CLIPTextModel, CLIPTokenizer

from lit_prefopt.export.pipeline_folder import write_pipeline
from lit_prefopt.toy.backbone import CHECKPOINT

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The scheduler of Stable Diffusion 1.5."""


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler | LCMScheduler,
) -> None:
    """Write a pipeline of these components without a safety checker; its class by the scheduler."""
    lcm = isinstance(scheduler, LCMScheduler)
    kind = LatentConsistencyModelPipeline if lcm else StableDiffusionPipeline
    pipeline = kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(pipeline, folder)


def assemble(parts: str, unet: str | None = None, output: str = str(CHECKPOINT)) -> None:
    """Write a Stable Diffusion pipeline in half precision.

    Args:
        parts: Folder with `vae/`, `text_encoder/` and `tokenizer/`.
        unet: Folder of the UNet; by default a new one, to be trained.
        output: The pipeline's folder.
    """
    source, target = Path(parts), Path(output)
    half = torch.float16 if unet else torch.float32
    vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=half)
    text_encoder = CLIPTextModel.from_pretrained(
        source / "text_encoder", dtype=half, trust_remote_code=False
    )
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer", trust_remote_code=False)
    scheduler = DDIMScheduler(**SCHEDULER)
    if unet is None:
        named = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        for name, part in {**named, "scheduler": scheduler}.items():
            part.save_pretrained(target / name)
        return
    denoiser = UNet2DConditionModel.from_pretrained(unet, torch_dtype=half)
    save_pipeline(target, vae, text_encoder, tokenizer, denoiser, scheduler)


if __name__ == "__main__":
    auto_cli(assemble, as_positional=False)

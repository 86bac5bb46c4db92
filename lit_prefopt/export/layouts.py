"""Layouts and precisions of exported weights."""

from typing import Literal

Layout = Literal[
    "diffusers-lora", "kohya", "comfyui", "unet", "transformer", "pipeline", "single-file"
]
DType = Literal["float32", "bfloat16", "float16"]

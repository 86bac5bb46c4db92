"""Layouts and precisions that weights are exported in."""

from typing import Literal

Layout = Literal["diffusers-lora", "kohya", "unet", "pipeline", "single-file"]
DType = Literal["float32", "bfloat16", "float16"]

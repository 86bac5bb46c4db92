"""Layouts and precisions of exported weights."""

from typing import Literal

Layout = Literal["diffusers-lora", "kohya", "unet", "pipeline", "single-file"]
DType = Literal["float32", "bfloat16", "float16"]

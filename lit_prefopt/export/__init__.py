"""Weights out of the library: LoRA files, merged denoisers, pipelines and single files."""

from lit_prefopt.weights.lora_files import LoRAFile, LoRALayer, read_lora
from lit_prefopt.weights.merge import merge_lora

__all__ = ["LoRAFile", "LoRALayer", "merge_lora", "read_lora"]

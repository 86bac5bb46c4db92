"""Export weights: LoRA files, merged denoisers, pipelines and single files."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.weights.lora_files import LoRAFile, LoRALayer, read_lora
    from lit_prefopt.weights.merge import merge_lora

__all__ = ["LoRAFile", "LoRALayer", "merge_lora", "read_lora"]

__getattr__, __dir__ = lazy_names(__name__)

"""LoRA files and state-dict key maps: read, convert and merge weights."""

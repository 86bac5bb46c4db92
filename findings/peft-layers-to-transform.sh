#!/usr/bin/env bash
# layers_to_transform=[0] on FLUX selects one linear layer of every block, and no attention.
#
# Versions and date: peft 0.21.2, diffusers 0.42.1, torch 2.13.0; 2026-11-30.
# One would guess: LoraConfig(layers_to_transform=[0]) puts LoRA on the targets of the first
#   block, as it does for a language model, whose blocks are `model.layers.0`.
# What happens: the first number that has two names before it counts as the block's. FLUX's blocks
#   stand at the top (`transformer_blocks.0.attn.to_q`), where only one name precedes the block's
#   number; what is found is the 0 of `ff.net.0.proj`. So LoRA sits on that layer of all blocks,
#   no attention has any, and there is neither error nor warning. With
#   layers_pattern="transformer_blocks" it does what one guesses. (With attention alone in
#   target_modules, nothing matches, and that is an error.)
# Why it matters: DiT-like transformers of diffusers keep their blocks at the top, and LoRA of a
#   few blocks is common for style and for memory. Nothing fails, but another LoRA is trained.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cd "$work"
venv/bin/python - <<'PY'
import sys
import warnings

import diffusers
import peft
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def adapted(**config):
    """Return the names of the layers that get LoRA."""
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    network.add_adapter(LoraConfig(target_modules=TARGETS, **config))
    return sorted(n.split(".lora_A")[0] for n, _ in network.named_parameters() if "lora_A" in n)


print(f"peft {peft.__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plain = adapted(layers_to_transform=[0])
about = [w for w in caught if "layers" in str(w.message)]
named = adapted(layers_to_transform=[0], layers_pattern="transformer_blocks")
print(f"layers_to_transform=[0], warnings about it: {len(about)}")
print(*(f"  {name}" for name in plain), sep="\n")
print('layers_to_transform=[0], layers_pattern="transformer_blocks":')
print(*(f"  {name}" for name in named), sep="\n")

seen_before = sorted(
    f"transformer_blocks.{i}.{part}.net.0.proj" for i in range(3) for part in ("ff", "ff_context")
)
same = (
    plain == seen_before
    and not about
    and "transformer_blocks.0.attn.to_q" in named
    and all(name.startswith("transformer_blocks.0.") for name in named)
)
print("as seen" if same else f"changed: the first list was {seen_before}")
sys.exit(not same)
PY

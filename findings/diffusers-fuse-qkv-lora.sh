#!/usr/bin/env bash
# fuse_qkv_projections() after load_lora_weights or add_adapter drops the LoRA of q, k and v.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: fusing the three projections into one is faster and changes no result, or it
#   refuses layers that have an adapter.
# What happens: the fused layer is made of the base layers' weights, and the LoRA layers of q, k
#   and v are no longer called. Output is that of the base model, without error or warning, while
#   get_active_adapters or the list of LoRA layers show the adapter as before. LoRA of other layers
#   (to_out, feed-forward) stays on. unfuse_qkv_projections() brings it back;
#   fuse_lora() before fuse_qkv_projections() keeps it.
# Why it matters: both calls stand in the guides for fast inference, and LoRA of attention alone is
#   the default of most training scripts. A comparison of a model with its LoRA then compares the
#   base with itself; a LoRA that goes on training gets no gradient for these layers.
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
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

ATTENTION = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]


def adapted():
    """Return a network with a random LoRA, the same one each time."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    network.add_adapter(LoraConfig(r=4, target_modules=ATTENTION))
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


torch.manual_seed(1)
inputs = {
    "hidden_states": torch.randn(1, 16, 8, 8),
    "timestep": torch.tensor([900.0]),
    "encoder_hidden_states": torch.randn(1, 12, 32),
    "pooled_projections": torch.randn(1, 24),
    "return_dict": False,
}


@torch.no_grad()
def distance(network, other):
    """Return the largest difference from another output, and the output."""
    output = network(**inputs)[0]
    return (output - other).abs().max().item(), output


print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
network = adapted()
_, with_lora = distance(network, torch.zeros(()))
network.disable_adapters()
lora, base = distance(network, with_lora)
print(f"the LoRA changes the output by {lora:.3f}")
network.enable_adapters()
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    network.fuse_qkv_projections()
fused, _ = distance(network, base)
print(f"after fuse_qkv_projections(): {fused:.1e} from the base; {len(caught)} warnings; active "
      f"adapters {network.active_adapters()}")
network.unfuse_qkv_projections()
unfused, _ = distance(network, with_lora)
print(f"after unfuse_qkv_projections(): {unfused:.1e} from the output with LoRA")
merged = adapted()
merged.fuse_lora()
with torch.no_grad():
    merged.fuse_qkv_projections()
kept, _ = distance(merged, with_lora)
print(f"fuse_lora() first: {kept:.1e} from the output with LoRA")

same = lora > 0.05 and fused < 1e-5 and not caught and network.active_adapters() == ["default"]
same = same and unfused < 1e-5 and kept < 1e-4
print("as seen" if same else "changed: the fused network had the base's output")
sys.exit(not same)
PY

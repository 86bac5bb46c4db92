#!/usr/bin/env bash
# With gradient checkpointing, a LoRA scale passed to the call gives wrong gradients.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: gradient checkpointing saves memory and changes no number, also when the call
#   has `joint_attention_kwargs={"scale": 0.5}`, the documented strength of the LoRA.
# What happens: the scale is set on all LoRA layers when the forward begins and taken back when it
#   ends. The backward pass recomputes each block after that, with the LoRA at scale 1. The output
#   and the loss are right, the gradients are those of another network, without error or warning:
#   all shapes are as they were. Without a scale in the call, or with a scale and no
#   checkpointing, they are right.
# Why it matters: a LoRA trained at half of its strength, or with a second one mixed in, needs
#   checkpointing to fit into memory as any other. The loss that is logged looks as it should, so
#   nothing shows that the steps go elsewhere. All models with the same decorator
#   (`apply_lora_scale`) do so: UNets, FLUX, Qwen-Image, ... set_adapters(name, weight) before the
#   forward has no such trap.
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
).requires_grad_(False)
network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
adapter = [p for p in network.parameters() if p.requires_grad]
for parameter in adapter:
    torch.nn.init.normal_(parameter, std=0.3)
network.train()  # there is no dropout
inputs = {
    "hidden_states": torch.randn(2, 16, 8, 8),
    "timestep": torch.tensor([900.0, 400.0]),
    "encoder_hidden_states": torch.randn(2, 12, 32),
    "pooled_projections": torch.randn(2, 24),
    "return_dict": False,
}
target = torch.randn(2, 16, 8, 8)


def step(checkpointing, options):
    """Return the loss and the gradient of the LoRA."""
    if checkpointing:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()
    network.zero_grad()
    loss = (network(**inputs, joint_attention_kwargs=options)[0] - target).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in adapter])


def compared(options):
    """Return whether the losses are equal, and the gradients' relative difference."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (loss, gradient), (same_loss, other) = step(False, options), step(True, options)
    distance = ((gradient - other).norm() / gradient.norm()).item()
    print(f"joint_attention_kwargs={options}: loss {loss:.6f} without checkpointing and "
          f"{same_loss:.6f} with it; gradients differ by {distance:.1%}; {len(caught)} warnings")
    return loss == same_loss, distance


print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
plain, scaled = compared(None), compared({"scale": 0.5})
network.set_adapters(["default"], [0.5])
print("after set_adapters(\"default\", 0.5):")
set_before = compared(None)
same = plain[0] and plain[1] < 1e-5 and scaled[0] and scaled[1] > 0.05
same = same and set_before[0] and set_before[1] < 1e-5
print("as seen" if same else "changed: with a scale of 0.5, equal losses had other gradients")
sys.exit(not same)
PY

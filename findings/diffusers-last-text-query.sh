#!/usr/bin/env bash
# SD3: one layer of the usual LoRA targets, the last block's text query, never gets a gradient.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: the LoRA targets of diffusers' own training script for Stable Diffusion 3
#   ("attn.add_q_proj" and seven others) name layers that can learn, and the last block, which was
#   made with `context_pre_only=True`, has no layers for a text output that nobody reads: it has no
#   `to_add_out` and no `ff_context`.
# What happens: it has `add_q_proj` (and in 3.5 `norm_added_q`), and computes the text's queries and
#   their attention to drop the result. The output does not depend on these weights in one bit.
#   Their gradient is zero, and not None: a search for parameters without a gradient finds nothing.
#   A LoRA there never moves away from the identity, while AdamW's decay shrinks its down matrix;
#   save_lora_weights writes it with the others.
# Why it matters: rank x 2 x width parameters, their moments and their place in the file are for
#   nothing, and so is the last block's attention of every text token (333 beside the 1,024 of an
#   image of 512 pixels). Whoever checks that every adapter learns, a usual test of a training
#   script, searches for a mistake of his own.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cd "$work"
venv/bin/python - <<'PY'
import sys

import diffusers
import peft
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

# `target_modules` of examples/dreambooth/train_dreambooth_lora_sd3.py
TARGETS = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"]
TARGETS += ["attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]
LAST = "transformer_blocks.1.attn.add_q_proj"

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
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
).train()  # there is no dropout
inputs = {
    "hidden_states": torch.randn(2, 16, 8, 8),
    "timestep": torch.tensor([900.0, 400.0]),
    "encoder_hidden_states": torch.randn(2, 12, 32),
    "pooled_projections": torch.randn(2, 24),
    "return_dict": False,
}
target = torch.randn(2, 16, 8, 8)


def loss():
    """Return the mean squared error."""
    return (network(**inputs)[0] - target).square().mean()


def zero_gradients():
    """Return the layers with a gradient of which no element differs from zero."""
    network.zero_grad()
    loss().backward()
    zero = [n for n, p in network.named_parameters() if p.grad is not None and not p.grad.any()]
    none = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    return sorted({n.rpartition(".")[0] for n in zero}), none


print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
full, none = zero_gradients()
print(f"all weights trained: {len(none)} without a gradient, zero in {full}")
with torch.no_grad():
    before = network(**inputs)[0]
    kept = network.get_submodule(LAST).weight.clone()
    network.get_submodule(LAST).weight.normal_()
    independent = torch.equal(network(**inputs)[0], before)
    network.get_submodule(LAST).weight.copy_(kept)
print(f"with other weights in {LAST} the output is equal in every bit: {independent}")

network.requires_grad_(False)
network.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=TARGETS))
adapter = {n: p for n, p in network.named_parameters() if p.requires_grad}
down = adapter[f"{LAST}.lora_A.default.weight"]
began = down.norm().item()
optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
still = [n.split(".lora_B")[0] for n, p in adapter.items() if "lora_B" in n and not p.any()]
layers = sum("lora_B" in name for name in adapter)
shrunk = down.norm().item() / began
print(f"after 100 steps {len(still)} of {layers} adapters is still the identity: {still}; its down "
      f"matrix has {shrunk:.1%} of its norm")
StableDiffusion3Pipeline.save_lora_weights(
    ".", transformer_lora_layers=get_peft_model_state_dict(network)
)
saved = [key for key in load_file("pytorch_lora_weights.safetensors") if LAST in key]
print(f"the saved file has {saved}")

same = full == [LAST, LAST.replace("add_q_proj", "norm_added_q")] and not none and independent
same = same and still == [LAST] and shrunk < 1 and len(saved) == 2
print("as seen" if same else "changed: the last block computed text queries whose result it drops")
sys.exit(not same)
PY

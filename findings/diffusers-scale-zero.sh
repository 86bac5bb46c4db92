#!/usr/bin/env bash
# After one call with a LoRA scale of 0, the weight that set_adapters gave is lost: it is 1.0.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: `cross_attention_kwargs={"scale": s}` holds for that call alone; afterwards the
#   adapter has the weight that set_adapters gave it.
# What happens: so it is for other numbers, which are divided out again after the call. 0 cannot
#   be divided out, so the weight is reset, and not to what it was: every active adapter has 1.0
#   then. An adapter mixed in at 0.5 is at 1.0 for all later calls.
# Why it matters: scale 0 is a common way to draw "before" beside "after" with one pipeline, or
#   to get the reference's prediction. The first "after" then has another strength than all later
#   ones, and the win rates of an adapter at 0.5 are in fact those of 1.0.
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
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
# random matrices in place of trained ones
unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False), "mine")
latents, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)


@torch.no_grad()
def output(**scale):
    return unet(latents, 500, encoder_hidden_states=prompt, cross_attention_kwargs=scale).sample


unet.disable_adapters()
base = output()
unet.enable_adapters()
unet.set_adapters(["mine"], [1.0])
full = output()
unet.set_adapters(["mine"], [0.5])
half = output()

print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
output(scale=0.25)
after_quarter = output()
off = output(scale=0.0)
after_zero = output()


def distance(a, b):
    return (a - b).abs().max().item()


print(f"weight 1.0 against 0.5:                          {distance(full, half):.4f}")
print(f"scale 0 against the adapter off:                 {distance(off, base):.4f}")
print(f"set to 0.5, after a call with scale 0.25: to 0.5 {distance(after_quarter, half):.4f}")
print(f"set to 0.5, after a call with scale 0: to 0.5    {distance(after_zero, half):.4f}, "
      f"to 1.0 {distance(after_zero, full):.4f}")
apart = distance(full, half)
same = (
    apart > 1e-3
    and distance(off, base) < 1e-3 * apart
    and distance(after_quarter, half) < 1e-3 * apart
    and distance(after_zero, full) < 1e-3 * apart
)
print("as seen" if same else "changed: after scale 0, the adapter had weight 1.0")
sys.exit(not same)
PY

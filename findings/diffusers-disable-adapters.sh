#!/usr/bin/env bash
# disable_adapters() of a diffusers model leaves the trained copies of `modules_to_save` on.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: disable_adapters ("fallback to inference with the base model only") gives back
#   the original network, as peft's own `with model.disable_adapter()` does for the same
#   LoraConfig.
# What happens: with LoraConfig(modules_to_save=["conv_in"]) the UNet's add_adapter trains a copy
#   of conv_in, and disable_adapters and disable_lora switch the LoRA off but keep the trained
#   copy: the "base model" has moved. There is no warning.
# Why it matters: DPO-like methods take the network with its adapter off as the reference. Such a
#   reference moves with the policy, so the log-ratio loses the part that conv_in learned and
#   nothing holds that part back; a comparison "with and without LoRA" has the same error.
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
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


torch.manual_seed(1)
latents, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)


def output(unet):
    return unet(latents, 500, encoder_hidden_states=prompt).sample


def step(unet):
    """Make one step of SGD on all that is trainable."""
    trainable = [p for p in unet.parameters() if p.requires_grad]
    output(unet).square().mean().backward()
    torch.optim.SGD(trainable, lr=1.0).step()


def moved(config, switch):
    """Return how far the network with its adapter off is from the original after one step."""
    with torch.no_grad():
        original = output(small_unet())
    unet = small_unet()
    if switch == "peft":
        unet = get_peft_model(unet, config)
        step(unet)
        with torch.no_grad(), unet.disable_adapter():
            return (output(unet) - original).abs().max().item()
    unet.add_adapter(config)
    step(unet)
    getattr(unet, switch)()
    with torch.no_grad():
        return (output(unet) - original).abs().max().item()


lora = LoraConfig(target_modules=["to_q", "to_v"])
lora_and_copy = LoraConfig(target_modules=["to_q", "to_v"], modules_to_save=["conv_in"])
print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
print("largest difference from the original network, adapter off, after one step:")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    seen = {
        "LoRA, disable_adapters()": moved(lora, "disable_adapters"),
        "LoRA and modules_to_save, peft's disable_adapter()": moved(lora_and_copy, "peft"),
        "LoRA and modules_to_save, disable_adapters()": moved(lora_and_copy, "disable_adapters"),
        "LoRA and modules_to_save, disable_lora()": moved(lora_and_copy, "disable_lora"),
    }
for name, difference in seen.items():
    print(f"  {name}: {difference:.4f}")
about = [w for w in caught if "modules_to_save" in str(w.message)]
print(f"  warnings that name modules_to_save: {len(about)}")
lora_off, peft_off, off, lora_off_too = seen.values()
same = lora_off == peft_off == 0 and off > 0.01 and lora_off_too > 0.01
print("as seen" if same else "changed: the first two were 0, the last two were not")
sys.exit(not same)
PY

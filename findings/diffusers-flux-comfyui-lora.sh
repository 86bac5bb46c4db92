#!/usr/bin/env bash
# LoRAs of FLUX.1 and FLUX.2 in ComfyUI's names (`diffusion_model.`): load_lora_weights loads
# nothing, or exchanges scale and shift, by the family and by how the two matrices are called.
#
# Versions and date: diffusers 0.42.1, peft 0.21.2, torch 2.13.0; 2026-11-30.
# One would guess: lora_A/lora_B and lora_down/lora_up are two names of the same matrices, and a
#   file that load_lora_weights accepts changes the layers that it names.
# What happens:
#   1. FLUX.1, lora_A/lora_B: no layer is adapted. With lora_down/lora_up the same file is loaded.
#   2. FLUX.2, lora_down/lora_up: no layer is adapted. With lora_A/lora_B the same file is loaded.
#      In both cases a line is logged, no error is raised, and images are the base's.
#   3. FLUX.2, final_layer.adaLN_modulation.1: the original code has shift before scale, diffusers
#      scale before shift. Its reader of checkpoints exchanges them, its reader of LoRAs does not:
#      the update of the scale goes to the shift, and the other way round.
# Why it matters: a comparison of a model with its LoRA compares the base with itself, and a LoRA of
#   the last modulation makes wrong images that look like bad training.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cd "$work"
venv/bin/python - 2> stderr.log <<'PY' || { code=$?; tail -n 5 stderr.log >&2; exit "$code"; }
import inspect
import sys

import diffusers
import peft
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

WIDTH = 32
generator = torch.Generator().manual_seed(0)


def lora(layer, outputs, inputs, down, up):
    """Return a LoRA of one layer under ComfyUI's name, and the update of its weight."""
    first = torch.randn(4, inputs, generator=generator)
    second = torch.randn(outputs, 4, generator=generator)
    key = f"diffusion_model.{layer}"
    return {f"{key}.{down}.weight": first, f"{key}.{up}.weight": second}, second @ first


def adapted(pipeline_class, network, state):
    """Return how many layers of a network have an adapter after its pipeline loaded a LoRA."""
    parts = [name for name in inspect.signature(pipeline_class).parameters if name != "is_distilled"]
    pipeline = pipeline_class(**dict.fromkeys(parts) | {"transformer": network})
    pipeline.load_lora_weights(dict(state))
    return sum(hasattr(module, "lora_A") for module in network.modules())


def flux1():
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )


def flux2():
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
    )


print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
seen = {}
for title, pipeline_class, build in (
    ("FLUX.1", FluxPipeline, flux1),
    ("FLUX.2", Flux2KleinPipeline, flux2),
):
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        state, _ = lora("double_blocks.0.img_attn.proj", WIDTH, WIDTH, down, up)
        seen[title, down] = adapted(pipeline_class, build(), state)
        print(f"{title}, {down} and {up}: {seen[title, down]} of 1 layer adapted")

layer = "final_layer.adaLN_modulation.1"
state, update = lora(layer, 2 * WIDTH, WIDTH, "lora_A", "lora_B")
read = Flux2KleinPipeline.lora_state_dict(dict(state))
name = "transformer.norm_out.linear"
as_lora = read[f"{name}.lora_B.weight"] @ read[f"{name}.lora_A.weight"]
checkpoint = convert_flux2_transformer_checkpoint_to_diffusers({f"{layer}.weight": update.clone()})
as_weight = checkpoint["norm_out.linear.weight"]
exchanged = torch.cat(as_lora.chunk(2)[::-1])
print(f"{layer}: the LoRA's update is the checkpoint's: {torch.allclose(as_lora, as_weight)}")
print(f"with scale and shift exchanged it is: {torch.allclose(exchanged, as_weight)}")
expected = {
    ("FLUX.1", "lora_A"): 0,
    ("FLUX.1", "lora_down"): 1,
    ("FLUX.2", "lora_A"): 1,
    ("FLUX.2", "lora_down"): 0,
}
wrong = not torch.allclose(as_lora, as_weight) and torch.allclose(exchanged, as_weight)
if seen == expected and wrong:
    print("as seen")
    sys.exit(0)
print("changed")
sys.exit(1)
PY

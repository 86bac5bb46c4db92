#!/usr/bin/env bash
# Memory of a training step counted on the meta device holds attention scores that no device keeps.
#
# Versions and date: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0; 2026-11-30.
# One would guess: a model on the meta device runs the operators of the real one without their
#   numbers, so that the sizes of the tensors that its forward keeps for the backward, summed by
#   `saved_tensors_hooks`, are what a GPU or a CPU will keep.
# What happens: `scaled_dot_product_attention` chooses its kernel by device. CPU and CUDA have fused
#   ones, which keep queries, keys, values, the output and a number for each row. The meta device has
#   none: it takes the plain formula, which keeps the scores of all pairs of tokens besides. Fake
#   tensors that claim to be on a CPU take the fused kernel and agree with the real CPU to the byte.
# Why it matters: "will it fit" is asked on the meta device, since the model does not fit here. The
#   error grows with the square of the tokens: the block below, of FLUX.2's kind, keeps 1.6 times as
#   much at 1,088 tokens and 3.3 times at 4,160, which are 1024 x 1024 pixels. A card is called too
#   small for what it can do.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'PY'
import sys

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

WORDS = 64


def kept(device, side):
    """Bytes that one forward keeps for its backward, weights left out."""
    with torch.device(device):
        model = Flux2Transformer2DModel(
            in_channels=32,
            num_layers=0,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=64,
            axes_dims_rope=(16, 16, 16, 16),
        )
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(
            hidden_states=torch.zeros(1, side * side, 32, device=device),
            encoder_hidden_states=torch.zeros(1, WORDS, 64, device=device),
            timestep=torch.full((1,), 0.5, device=device),
            img_ids=torch.zeros(1, side * side, 4, device=device),
            txt_ids=torch.zeros(1, WORDS, 4, device=device),
            guidance=torch.ones(1, device=device),
        )
    return sum(size for size, _ in sizes.values())


print(f"torch {torch.__version__}, diffusers {diffusers.__version__}")
ratios = []
for side in (16, 32, 64):
    real, meta = kept("cpu", side), kept("meta", side)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = kept("cpu", side)
    ratios.append(meta / real)
    print(
        f"{side * side + WORDS:5} tokens: real CPU {real / 2**20:7.1f} MiB, fake CPU tensors "
        f"{fake / 2**20:7.1f} MiB, meta device {meta / 2**20:7.1f} MiB, {meta / real:.1f} times"
    )
    exact = fake == real
    if not exact:
        break
same = exact and ratios[0] < ratios[1] < ratios[2] and ratios[2] > 3
print("as seen" if same else "changed: the meta device kept scores, fake CPU tensors did not")
sys.exit(not same)
PY

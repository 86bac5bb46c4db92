#!/usr/bin/env bash
# A forward of diffusers' Z-Image on fake tensors changes what the network computes afterwards.
#
# Versions and date: diffusers 0.42.1, torch 2.13.0; 2026-12-01.
# One would guess: under FakeTensorMode nothing is computed, so that a forward there, made to learn
#   the memory or the FLOPs of a step, leaves a network as it was.
# What happens: the transformers of Z-Image and Qwen-Image compute their tables of positions in the
#   first forward and keep them. Made under FakeTensorMode the tables have no values. Z-Image's later
#   forwards on real tensors return ordinary, finite tensors that are wrong, without a warning;
#   Qwen-Image's raise "Tensor must have a last dimension of size 2", an error that names neither the
#   table nor the fake tensors. After one real forward, fake ones do no harm.
# Why it matters: tools that estimate memory before a training do such a forward first. A Z-Image
#   is then trained and sampled without its positions, and the loss looks plausible. The order
#   (real forward first) or a copy of the network avoids it.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - 2> log <<'PY'
import sys

import diffusers
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

HALF = torch.tensor([0.5])


def z_image():
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    return network, {"x": [torch.randn(4, 1, 8, 8)], "cap_feats": [torch.randn(5, 16)], "t": HALF}


def qwen_image():
    torch.manual_seed(0)
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return network, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": HALF,
        "img_shapes": [[(1, 4, 4)]],
    }


@torch.no_grad()
def output(network, inputs):
    [result] = network(**inputs, return_dict=False)
    return result[0] if isinstance(result, list) else result


def after_a_fake_forward(make, real_first):
    """Return what a network computes after a fake forward, or the error, and what it should."""
    right, (network, inputs) = output(*make()), make()
    if real_first:
        output(network, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output(network, inputs)
    try:
        return output(network, inputs), right
    except RuntimeError as error:
        return str(error), right


print("diffusers", diffusers.__version__, "torch", torch.__version__)
found = {}
for name, make in (("Z-Image", z_image), ("Qwen-Image", qwen_image)):
    for real_first in (False, True):
        got, right = after_a_fake_forward(make, real_first)
        if isinstance(got, str):
            seen = f"RuntimeError: {got}"
        elif torch.equal(got, right):
            seen = "the right output"
        else:
            far = (got - right).abs().max() / right.abs().max()
            seen = f"a {type(got).__name__}, finite: {bool(got.isfinite().all())}, off by {far:.0%}"
        when = "after a real one" if real_first else "as the first one"
        print(f"{name}, a fake forward {when}: {seen}")
        found[name, real_first] = seen
expected = found["Z-Image", False].startswith("a Tensor, finite: True, off by")
expected &= "last dimension of size 2" in found["Qwen-Image", False]
expected &= found["Z-Image", True] == found["Qwen-Image", True] == "the right output"
print("as seen" if expected else "CHANGED")
sys.exit(0 if expected else 1)
PY

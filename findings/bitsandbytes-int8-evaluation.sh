#!/usr/bin/env bash
# bitsandbytes' Linear8bitLt computes something else after `.eval()`, and NaN for large inputs.
#
# Versions and date: bitsandbytes 0.50.2, torch 2.13.0; 2026-11-30; on a CPU.
# One would guess: a linear layer without dropout computes the same in training and in evaluation;
#   in float32 an input of 1e5 is no trouble, and an input may have any number of dimensions.
# What happens: in training mode the frozen weights are dequantized, and that is all. In evaluation
#   mode inputs are rounded to 8 bits too, by way of float16, where those beyond 65504 are infinite:
#   outputs are NaN, without an error. The error of ordinary inputs is several times as large. The
#   gradient of an input of four dimensions is a RuntimeError in evaluation mode alone.
# Why it matters: losses and samples of one model disagree, as the first are computed in training
#   mode and the second in evaluation mode; a cached reference, computed in evaluation mode, is not
#   that of the training, and a preference margin that should start at 0 does not.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$work"
venv/bin/python - <<'PY'
import logging
import sys

import bitsandbytes
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import nn

logging.disable(logging.WARNING)
torch.manual_seed(0)
exact = nn.Linear(256, 512).requires_grad_(False)
layer = Linear8bitLt(256, 512, has_fp16_weights=False)
layer.weight = Int8Params(exact.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
layer.bias = exact.bias
layer = layer.to("cpu")


def error(x):
    return float((layer(x) - exact(x)).norm() / exact(x).norm())


def gradient(shape):
    x = torch.randn(shape, requires_grad=True)
    try:
        layer(x).sum().backward()
    except RuntimeError as failure:
        return f"RuntimeError: {failure}"
    return "a gradient"


ordinary, large = torch.randn(2, 64, 256), 1e5 * torch.randn(2, 64, 256)
ordinary[..., 3] *= 30  # one channel larger than others, as transformers have
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
found = {}
for mode in ("train", "eval"):
    getattr(layer, mode)()
    found[mode] = (error(ordinary), bool(layer(large).isfinite().all()), gradient((2, 3, 4, 256)))
    print(f"{mode}: relative error {found[mode][0]:.4f}, of inputs of 1e5 finite: {found[mode][1]},")
    print(f"  of four dimensions: {found[mode][2]}")
(train, finite, four), (evaluation, still_finite, not_four) = found.values()
same = evaluation > 3 * train and finite and not still_finite
same = same and four == "a gradient" and not_four.startswith("RuntimeError")
print("as seen" if same else "changed: evaluation mode rounded inputs through float16")
sys.exit(not same)
PY

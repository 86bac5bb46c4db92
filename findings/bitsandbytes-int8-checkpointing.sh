#!/usr/bin/env bash
# Gradient checkpointing frees no input of bitsandbytes' Linear8bitLt.
#
# Versions and date: bitsandbytes 0.50.2, torch 2.13.0; 2026-11-30.
# One would guess: inside `torch.utils.checkpoint.checkpoint` (without re-entrance, torch's advice)
#   the inputs of the layers are freed after the forward and computed again in the backward, as those
#   of nn.Linear and of bitsandbytes' own Linear4bit are.
# What happens: all inputs stay. The layer's autograd function stores its input as an attribute of
#   its context (`ctx.A`, `ctx.tensors`), not by `save_for_backward`, and checkpointing never sees
#   it. The weights are frozen, so that the backward does not even use it.
# Why it matters: checkpointing is what makes a LoRA over an int8 transformer fit. Each linear
#   layer's input is kept nevertheless: those of all blocks at once, in place of one block's.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$work"
venv/bin/python - <<'PY'
import gc
import logging
import sys
import weakref

import bitsandbytes
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch.utils.checkpoint import checkpoint

logging.disable(logging.WARNING)
WIDTH, LAYERS = 256, 6


def plain():
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def four_bits():
    source, layer = plain(), Linear4bit(WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = Params4bit(source.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu").requires_grad_(False)


def eight_bits():
    source, layer = plain(), Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
    layer.weight = Int8Params(source.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias.requires_grad_(False)
    return layer.to("cpu")


def alive(make):
    """Return how many of the inner layers' inputs exist after a checkpointed forward."""
    net, inputs = nn.Sequential(*(make() for _ in range(LAYERS))).train(), []
    for layer in net[1:]:
        layer.register_forward_pre_hook(
            lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
    x = torch.randn(2, 64, WIDTH, requires_grad=True)
    out = checkpoint(net, x, use_reentrant=False)
    gc.collect()
    count = sum(ref() is not None for ref in inputs)
    out.sum().backward()
    assert x.grad is not None
    return count


torch.manual_seed(0)
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
found = {make.__name__: alive(make) for make in (plain, four_bits, eight_bits)}
for name, count in found.items():
    print(f"{name}: {count} of {LAYERS - 1} inputs are kept after a checkpointed forward")
same = found == {"plain": 0, "four_bits": 0, "eight_bits": LAYERS - 1}
print("as seen" if same else "changed: only layers in eight bits kept their inputs")
sys.exit(not same)
PY

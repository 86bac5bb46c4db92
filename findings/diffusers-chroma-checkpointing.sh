#!/usr/bin/env bash
# With gradient checkpointing, Chroma's single blocks run without the attention mask.
#
# Versions and date: diffusers 0.42.1, torch 2.13.0; 2026-11-30.
# One would guess: gradient checkpointing saves memory and changes no number.
# What happens: ChromaTransformer2DModel passes `attention_mask` to the checkpointed double blocks,
#   and leaves it out of the checkpointed single blocks (38 of the 57 blocks of Chroma1-HD), without
#   error or warning. In training with checkpointing the prediction, the loss and the gradients are
#   those of another network than the one that is sampled; without a mask nothing differs. The
#   same holds of a mask of bools.
# Why it matters: 8.9 billion parameters are trained with checkpointing. A method that compares the
#   policy (with gradients, so checkpointed) with a reference (without, so not checkpointed) begins
#   with a margin other than 0 although both have the same weights.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'PY'
import sys
import warnings

import diffusers
import torch
from diffusers import ChromaTransformer2DModel

torch.manual_seed(0)
network = ChromaTransformer2DModel(
    in_channels=64,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    axes_dims_rope=(4, 4, 8),
    approximator_num_channels=16,
    approximator_hidden_dim=24,
    approximator_layers=2,
).train()  # there is no dropout
text, image = 12, 16
inputs = {
    "hidden_states": torch.randn(1, image, 64),
    "timestep": torch.tensor([0.7]),
    "encoder_hidden_states": torch.randn(1, text, 32),
    "txt_ids": torch.zeros(text, 3),
    "img_ids": torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 4, 4))),
    "return_dict": False,
}
seen = []
for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
    block.register_forward_pre_hook(
        lambda block, args, named: seen.append(
            named.get("attention_mask") is not None or any(
                isinstance(x, torch.Tensor) and x.shape == (1, text + image) for x in args
            )
        ),
        with_kwargs=True,
    )


def predicted(mask, checkpointing, gradients=True):
    """Return the prediction, and which of the blocks got a mask."""
    if checkpointing:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()
    seen.clear()
    with torch.set_grad_enabled(gradients):
        return network(**inputs, attention_mask=mask)[0].detach(), [*seen]


def compared(name, mask):
    """Return the largest difference of the prediction under checkpointing, and the masked blocks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (plain, _), (saved, masked) = predicted(mask, False), predicted(mask, True)
    distance = ((plain - saved).norm() / plain.norm()).item()
    print(f"{name}: blocks with a mask under checkpointing {masked}; the prediction differs by "
          f"{distance:.2%}; {len(caught)} warnings")
    return distance, masked


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
numbers = torch.cat([torch.arange(text)[None] <= 3, torch.ones(1, image, dtype=torch.bool)], 1)
none, (bools, masked), (floats, _) = (
    compared("no mask", None)[0],
    compared("a mask of bools", numbers),
    compared("the stock pipeline's mask of 0.0 and 1.0", numbers.float()),
)
policy, reference = (predicted(numbers, True, on)[0] for on in (True, False))
apart = (policy - reference).norm() / policy.norm()
print(f"the same weights with and without gradients, both checkpointing: {apart:.2%} apart")
same = none == 0 and bools > 1e-4 and floats > 1e-4 and apart > 1e-4
same = same and masked == [True, False, False]
print("as seen" if same else "changed: single blocks had no mask, and the prediction differed")
sys.exit(not same)
PY

#!/usr/bin/env bash
# Under accumulate_grad_batches, the last step of an epoch has too small a gradient.
#
# Versions and date: lightning 2.6.6, torch 2.13.0; 2026-11-30.
# One would guess: an epoch of 6 micro-batches, accumulating 4, makes a step of 4 and a step of 2,
#   and both have the mean gradient of their micro-batches.
# What happens: every loss is divided by 4, the number planned, also in the window that holds 2:
#   the gradient of that step is 2/4 of the mean. An epoch of 1 micro-batch that accumulates 50
#   trains with 1/50 of it, in every step. There is no warning.
# Why it matters: preferences are few and effective batches large (2,048 pairs in Diffusion-DPO),
#   so an epoch often holds fewer micro-batches than are accumulated. Adam alone hides the factor,
#   since it normalises; what depends on the size of a gradient does not: SGD, a clipping
#   threshold, a logged gradient norm, and Adam's moments where short and full windows alternate.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$work"
venv/bin/python - <<'PY'
import logging
import sys
import warnings

import lightning
import torch
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Line(lightning.LightningModule):
    """A loss whose gradient is 1 for every sample: so is its mean over any window."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.gradients = []

    def training_step(self, batch, index):
        return self.weight * batch.mean()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def gradients(micro_batches, accumulate):
    module = Line()
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(torch.ones(micro_batches), batch_size=1))
    return module.gradients


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
expected = {
    (8, 4): [1.0, 1.0],
    (7, 4): [1.0, 0.75],
    (6, 4): [1.0, 0.5],
    (5, 4): [1.0, 0.25],
    (1, 50): [0.02],
}
same = True
for (micro_batches, accumulate), seen_before in expected.items():
    seen = gradients(micro_batches, accumulate)
    mean = [1.0] * len(seen)
    same &= torch.allclose(torch.tensor(seen), torch.tensor(seen_before))
    print(f"{micro_batches} micro-batches, accumulating {accumulate}: gradients of the steps "
          f"{[round(g, 4) for g in seen]}, the means {mean}")
print("as seen" if same else f"changed: it was {list(expected.values())}")
sys.exit(not same)
PY

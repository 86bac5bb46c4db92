#!/usr/bin/env bash
# Gradient accumulation under Lightning's DeepSpeed strategy: gradients are divided twice, and
# DeepSpeed and Lightning count different optimizer steps.
#
# Versions and date: lightning 2.6.6, deepspeed 0.19.8, torch 2.13.0; 2026-11-30.
# One would guess: `strategy="deepspeed_stage_2"` with accumulate_grad_batches=4 makes the steps
#   that `strategy="auto"` makes, and trainer.global_step counts them.
# What happens:
#   1. Lightning divides every loss by 4, and DeepSpeed, which gets gradient_accumulation_steps=4
#      from Lightning, divides by 4 again: a step has 1/4 of the mean gradient (1/N for N).
#   2. DeepSpeed counts micro-batches over the epoch's end, Lightning from the start of each epoch
#      and, with this strategy, makes no step at its end. With 6 micro-batches an epoch, DeepSpeed
#      steps after the 4th, 8th and 12th, Lightning counts steps after the 4th and the 10th. With
#      3 an epoch, global_step stays at 0 for ever while the weights move: max_steps is never
#      reached.
# Why it matters: ZeRO is for the full fine-tunes of large backbones, whose effective batches are
#   accumulated over many micro-batches. Adam alone hides the factor 1/N; a clipping threshold,
#   which gradients then seldom reach, logged gradient norms and SGD do not. What goes by
#   global_step (max_steps, checkpoints) comes after more optimizer steps than planned.
# Lightning refuses this strategy without a GPU. The subclass here changes the device and the
# setup of the process group alone, so that it runs anywhere; the code of accumulation is
# Lightning's. DeepSpeed builds an extension first: a C++ compiler must be there.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 lightning==2.6.6 \
    deepspeed==0.19.8
cd "$work"
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$work/extensions" PATH="$work/venv/bin:$PATH"
venv/bin/python - 2> stderr.log <<'PY' || { code=$?; tail -n 5 stderr.log >&2; exit "$code"; }
import logging
import sys
import warnings

import deepspeed
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    @property
    def root_device(self):
        return torch.device("cpu", 0)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Line(lightning.LightningModule):
    """A loss whose gradient is 1 for every micro-batch: SGD at rate 1 makes steps of size 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.moved = []  # the weight after each micro-batch
        self.counted = []  # global_step after each micro-batch

    def training_step(self, batch, index):
        return self.weight.sum() * batch.mean()

    def on_train_batch_end(self, outputs, batch, index):
        self.moved.append(-self.weight[0].item())
        self.counted.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def run(strategy, micro_batches, accumulate, epochs):
    """Return the sizes of the steps, the micro-batches after which they came, those after which
    global_step rose."""
    module = Line()
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(torch.ones(micro_batches), batch_size=1))
    moved, counted = [0.0, *module.moved], [0, *module.counted]
    batches = range(1, len(moved))
    at = [i for i in batches if moved[i] != moved[i - 1]]
    return (
        [round(moved[i] - moved[i - 1], 4) for i in at],
        at,
        [i for i in batches if counted[i] != counted[i - 1]],
    )


def zero2():
    return DeepSpeedOnCPU(stage=2, process_group_backend="gloo")


print(f"lightning {lightning.__version__}, deepspeed {deepspeed.__version__}, "
      f"torch {torch.__version__}")
cases = [
    ("auto, 8 an epoch, accumulating 4", ("auto", 8, 4, 1), ([1.0, 1.0], [4, 8], [4, 8])),
    ("ZeRO-2, 2 an epoch, accumulating 1", (zero2(), 2, 1, 1), ([1.0, 1.0], [1, 2], [1, 2])),
    ("ZeRO-2, 8 an epoch, accumulating 4", (zero2(), 8, 4, 1), ([0.25, 0.25], [4, 8], [4, 8])),
    ("ZeRO-2, 6 an epoch, accumulating 4, 2 epochs", (zero2(), 6, 4, 2),
     ([0.25] * 3, [4, 8, 12], [4, 10])),
    ("ZeRO-2, 3 an epoch, accumulating 4, 4 epochs", (zero2(), 3, 4, 4),
     ([0.25] * 3, [4, 8, 12], [])),
]
same = True
for name, arguments, before in cases:
    seen = run(*arguments)
    same &= seen == before
    sizes, stepped, counted = seen
    print(f"{name}: steps of size {sizes} after micro-batches {stepped}; "
          f"global_step rises after {counted}")
    if seen != before:
        print(f"  changed: it was {before}")
print("as seen" if same else "changed")
sys.exit(not same)
PY

#!/usr/bin/env bash
# Lightning: a fit that is resumed at its last step calls neither on_train_start nor on_train_end.
#
# Versions and date: lightning 2.6.6, torch 2.13.0; 2026-11-30.
# One would guess: fit(ckpt_path=last) of a run that has all its steps trains nothing, and calls the
#   hooks of start and end around that nothing, so that what the end does is done.
# What happens: on_fit_start, on_load_checkpoint and on_fit_end are called, and on_train_start and
#   on_train_end are not, since the loop is skipped as a whole.
# Why it matters: a run is often stopped after its last step, in a validation, an evaluation or an
#   export, and resumed. Callbacks that average weights swap the average in at on_train_end and
#   export or evaluate at on_fit_end: the resumed run then writes the weights without the average.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$work"
venv/bin/python - 2> /dev/null <<'PY'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
HOOKS = ("on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "on_fit_end")


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, _):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Named(Callback):
    def __init__(self):
        self.called = []


def note(name):
    def hook(self, *args, **kwargs):
        self.called.append(name)

    return hook


for name in HOOKS:
    setattr(Named, name, note(name))


def run(**options):
    """Return the hooks that a fit of one step calls, and its trainer."""
    callback = Named()
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Module(), DataLoader(torch.ones(4, 1)), **options)
    return callback.called, trainer


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
whole, trainer = run()
trainer.save_checkpoint("last.ckpt")
resumed, _ = run(ckpt_path="last.ckpt", weights_only=True)
print("from the start:", *whole)
print("resumed at the end:", *resumed)
if whole == list(HOOKS) and resumed == ["on_fit_start", "on_fit_end"]:
    print("as seen")
else:
    sys.exit("changed")
PY

"""Gradient release: update each weight in the backward pass, then free its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_prefopt.errors import InputError


def release_gradients(optimizer: Any) -> None:
    """Update weights in the backward pass, so that one gradient exists at a time.

    `optimizer.step()` does nothing afterwards.

    Args:
        optimizer: An optimizer of bitsandbytes, which updates its weights one by one.
    """
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, weight in enumerate(group["params"]):
            step = partial(_step, optimizer, gindex, pindex)
            weight.register_post_accumulate_grad_hook(step)


@torch.no_grad()
def _step(optimizer: Any, gindex: int, pindex: int, weight: nn.Parameter) -> None:
    """Update one weight as the optimizer's `step` does, and free its gradient."""
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    group = optimizer.param_groups[gindex]
    if not optimizer.state[weight]:
        optimizer.init_state(group, weight, gindex, pindex)
    optimizer.prefetch_state(weight)
    optimizer.update_step(group, weight, gindex, pindex)
    weight.grad = None


def check_release(trainer: Trainer) -> None:
    """Check that a run does not need all gradients at once.

    Args:
        trainer: The Trainer of the run.
    """
    callbacks = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
    reasons = {
        "gradients of several batches are added (set `--batch.pairs` to `data.batch_size`)": (
            trainer.accumulate_grad_batches > 1
        ),
        "their common norm is clipped (`--trainer.gradient_clip_val null`)": bool(
            trainer.gradient_clip_val
        ),
        "they are scaled (`--trainer.precision bf16-mixed`)": trainer.precision == "16-mixed",
        "several ranks average them (`--trainer.devices 1`)": trainer.world_size > 1,
        "Guard checks them (drop the callback)": "Guard" in callbacks,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"Gradients are released in the backward pass, before {reason}: change that, or "
                "set `--model.optimizer.release_gradients false`."
            )

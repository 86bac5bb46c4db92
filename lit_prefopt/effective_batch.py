"""The effective batch: pairs per optimizer step, whatever the number of devices."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_prefopt.errors import InputError, check_number

REPLACED = {
    "pairs": ("accumulate_grad_batches",),
    "validate_every": ("val_check_interval", "check_val_every_n_epoch"),
}
"""Keys of `batch`, with the Trainer's keys that set the same thing."""


def prefer_trainer_keys(config: Any, given: Set[str]) -> None:
    """Drop numbers of a recipe's `batch` where the command line has the Trainer's own key.

    Args:
        config: The recipe, which is changed.
        given: Keys of the command line.
    """
    for key, names in REPLACED.items():
        value = config.batch[key]
        named = [
            name
            for name in names
            if f"trainer.{name}" in given and config.trainer[name] is not None
        ]
        if value is not None and named and f"batch.{key}" not in given:
            config.batch[key] = None
            rank_zero_info(
                f"trainer.{named[0]} of the command line replaces the recipe's batch.{key} "
                f"({value})."
            )


class EffectiveBatch(Callback):
    """Sets gradient accumulation and the validation interval from numbers of pairs and steps.

    `trainer.accumulate_grad_batches` becomes `pairs` / (`data.batch_size` x number of devices), so
    that neither more devices nor another `data.batch_size` change what a step learns from. Pairs
    are the rows of a batch of the data module: pairs of images or latents, rows drawn from what an
    on-policy method collected, labelled pairs for a judge, single images for a fine-tune.

    The last step of an epoch averages over the pairs that are left.

    Args:
        pairs: Pairs per optimizer step, over all devices; where it is not given, they follow from
            `data.batch_size`, the number of devices and `trainer.accumulate_grad_batches`.
        validate_every: Optimizer steps between two validations; where it is not given,
            `trainer.val_check_interval` counts batches.
    """

    def __init__(self, pairs: int | None = None, validate_every: int | None = None) -> None:
        check_number("batch.pairs", pairs, 1, optional=True)
        check_number("batch.validate_every", validate_every, 1, optional=True)
        self.pairs, self.validate_every = pairs, validate_every

    def check_alone(self, trainer: Any) -> None:
        """Refuse keys of the Trainer that say the same.

        Args:
            trainer: The Trainer's arguments; what is None was not given.
        """
        epochs = trainer.check_val_every_n_epoch
        given = {
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "val_check_interval": trainer.val_check_interval,
            "check_val_every_n_epoch": None if epochs == 1 else epochs,
        }
        for key, name in ((key, name) for key, names in REPLACED.items() for name in names):
            value = given[name]
            if value is not None and getattr(self, key) is not None:
                raise InputError(
                    f"trainer.{name} ({value}) and batch.{key} ({getattr(self, key)}) set the same "
                    f"thing: leave the first out, or set `--batch.{key} null`."
                )

    def apply(self, trainer: Trainer, data: Any) -> None:
        """Set what the Trainer accumulates and when it validates.

        Args:
            trainer: Not started yet.
            data: The data module.

        Raises:
            InputError: The pairs cannot be divided into batches of the data module.
        """
        if self.pairs is not None:
            size = getattr(data, "batch_size", None)
            if not isinstance(size, int):
                raise InputError(
                    f"batch.pairs wants to know the pairs of a batch, and {type(data).__name__} "
                    "has no attribute batch_size: give it one, or set "
                    "`--trainer.accumulate_grad_batches N` and `--batch.pairs null`."
                )
            devices = trainer.num_devices * trainer.num_nodes
            trainer.accumulate_grad_batches = batches_per_step(self.pairs, size, devices)
        if self.validate_every is not None:
            trainer.val_check_interval = self.validate_every * trainer.accumulate_grad_batches
            trainer.check_val_every_n_epoch = None  # count on over epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps at the ends of epochs, which have fewer batches, as steps too."""
        batches = trainer.num_training_batches
        if self.validate_every is not None and isinstance(batches, int) and batches:
            steps = math.ceil(batches / trainer.accumulate_grad_batches)
            trainer.val_check_batch = max(1, self.validate_every * batches // steps)


def batches_per_step(pairs: int, batch_size: int, devices: int) -> int:
    """Return the batches of one device that make an optimizer step.

    Args:
        pairs: Pairs per optimizer step.
        batch_size: Pairs in a batch of one device.
        devices: How many there are.

    Raises:
        InputError: They do not make it exactly.
    """
    together = batch_size * devices
    if pairs % together == 0:
        return pairs // together
    sizes = [n for n in range(1, pairs + 1) if pairs % (n * devices) == 0]
    near = [max((n for n in sizes if n < batch_size), default=None)]
    near += [min((n for n in sizes if n > batch_size), default=None)]
    cures = [f"`--data.batch_size {n}`" for n in near if n]
    cures += [f"`--batch.pairs {n * together}`" for n in (pairs // together, pairs // together + 1)]
    raise InputError(
        f"batch.pairs is {pairs}, no multiple of data.batch_size {batch_size} x {devices} ranks: "
        f"set {' or '.join(cure for cure in cures if not cure.endswith(' 0`'))}."
    )


def scale_last_step(loss: Tensor, trainer: Trainer | None) -> Tensor:
    """Scale a loss at the end of an epoch, where fewer batches are left than are accumulated.

    Lightning steps after the last batch of an epoch, and divides the loss of every batch by
    `accumulate_grad_batches`; the gradient of that step would be too small.

    Args:
        loss: Of the batch that is trained on.
        trainer: The Trainer; None outside of one.
    """
    if trainer is None or not isinstance(trainer.num_training_batches, int):
        return loss
    batches, planned = trainer.num_training_batches, trainer.accumulate_grad_batches
    left = batches % planned
    if not left or trainer.fit_loop.epoch_loop.batch_idx < batches - left:
        return loss
    return loss * (planned / left)


def warn_of_short_epochs(trainer: Trainer) -> None:
    """Warn of a run whose epochs have fewer batches than an optimizer step accumulates."""
    batches, planned = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches >= planned:
        return
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    rows, unit = (size * trainer.world_size, "pairs") if size else (1, "batches")
    rank_zero_warn(
        f"An epoch of {int(batches) * rows} {unit} never reaches the effective batch of "
        f"{planned * rows}: every optimizer step takes one epoch; lower `--batch.pairs`, or give "
        "more pairs."
    )


def last_step(trainer: Trainer, batches: float, accumulated: int) -> int:
    """Return how many optimizer steps a run has; -1 where it has no end.

    Args:
        trainer: With the recipe's own limits.
        batches: Batches of an epoch.
        accumulated: Batches of an optimizer step.
    """
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        ends.append(trainer.max_epochs * math.ceil(batches / accumulated))
    return min(ends, default=-1)


def planned_steps(trainer: Trainer) -> int:
    """Return how many optimizer steps a run will have, before its data are loaded; -1: no end."""
    epochs = trainer.max_epochs
    batches = _batches_per_epoch(trainer) if epochs is not None and epochs > 0 else math.inf
    return last_step(trainer, batches, trainer.accumulate_grad_batches)


def _batches_per_epoch(trainer: Trainer) -> float:
    # Lightning's own estimate would begin to iterate over the data before a run is restored
    source: Any = trainer.fit_loop._data_source
    batches = getattr(source.instance, "batches_per_epoch", None)
    if batches is None:
        loader = source.dataloader()
        batches = len(loader) if hasattr(loader, "__len__") else math.inf
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else batches * limit // 1

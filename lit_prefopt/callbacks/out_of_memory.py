"""Handle out-of-memory errors: suggest settings that save memory, with their savings."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prefopt.estimate.memory import GIB, advice, footprint, savings
from lit_prefopt.estimate.step_cost import step_cost
from lit_prefopt.learner import Learner
from lit_prefopt.utils.device import is_out_of_memory

BLUNT = (
    "Out of memory; the largest savings come from a LoRA (`--backbone.lora.rank 16`), "
    "`--backbone.gradient_checkpointing true`, a smaller `--data.batch_size` with the same "
    "`--batch.pairs`, and `--model.optimizer AdamW8bit`."
)
"""The message when there is no model to compute savings for."""


class OutOfMemory(Callback):
    """Computes memory savings when a run is out of memory.

    The command line adds it to every `fit` and prints its message.
    """

    def __init__(self) -> None:
        self.message: str | None = None
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the current batch."""
        self._batch = batch

    def on_train_batch_end(self, *_: Any) -> None:
        """Drop the batch."""
        self._batch = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Compute the savings, while the model is still set up."""
        if not is_out_of_memory(exception):
            return
        self.message = BLUNT
        with suppress(Exception):  # must not hide the original error
            self.message = suggest(trainer, pl_module, self._batch, exception)


def suggest(trainer: Trainer, module: LightningModule, batch: Any, error: BaseException) -> str:
    """Return a message with the memory footprint and a list of savings.

    Args:
        trainer: Gives precision and accumulation.
        module: The trained module.
        batch: The current batch, if a step had started.
        error: The out-of-memory error.
    """
    if not isinstance(module, Learner):
        return BLUNT
    context = trainer.precision_plugin.forward_context
    activations = 0 if batch is None else step_cost(module, batch, context).activations
    parts = footprint(module, activations)
    found = savings(module, batch, trainer.accumulate_grad_batches * trainer.world_size, context)
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.named().items())
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    missing = f" for {wanted[1]} more" if wanted else ""
    return (
        f"Out of memory{missing}: by tensor shapes the recipe needs {parts.total / GIB:.2f} GiB "
        f"in addition to the libraries ({sizes}); possible savings:\n{advice(found)}"
    )

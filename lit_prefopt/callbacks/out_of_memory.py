"""When memory runs out: what would save how much, in place of a bare trace."""

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
    "Memory does not suffice; what saves most is a LoRA (`--backbone.lora.rank 16`), "
    "`--backbone.gradient_checkpointing true`, a smaller `--data.batch_size` with the same "
    "`--batch.pairs`, and `--model.optimizer AdamW8bit`."
)
"""What is said where no model is at hand to compute it of."""


class OutOfMemory(Callback):
    """Notes what a run was doing when memory ran out, and finds out what would help.

    The command line adds it to every `fit` and says what it found.
    """

    def __init__(self) -> None:
        self.message: str | None = None
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what is tried."""
        self._batch = batch

    def on_train_batch_end(self, *_: Any) -> None:
        """Forget it."""
        self._batch = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Compute what would help, while the model is where it was."""
        if not is_out_of_memory(exception):
            return
        self.message = BLUNT
        with suppress(Exception):  # it must not hide what has happened
            self.message = suggest(trainer, pl_module, self._batch, exception)


def suggest(trainer: Trainer, module: LightningModule, batch: Any, error: BaseException) -> str:
    """Return a sentence and the list of what would save how much.

    Args:
        trainer: Knows precision and accumulation.
        module: What was trained.
        batch: What it was trained on then, if a step had begun.
        error: What the device or the host said.
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
        f"Memory does not suffice{missing}: by its shapes the recipe takes {parts.total / GIB:.2f} "
        f"GiB beside what libraries take ({sizes}), and of these would save\n{advice(found)}"
    )

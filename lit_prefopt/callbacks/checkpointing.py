"""Choose gradient checkpointing by the memory of the device, at the first batch of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.estimate.memory import FITS, GIB, footprint
from lit_prefopt.estimate.step_cost import checkpointing, forward_activations
from lit_prefopt.learner import Learner
from lit_prefopt.strategies.full_state import FullStateStrategy
from lit_prefopt.utils.device import free_bytes
from lit_prefopt.weights.checks import first_line


class ChooseCheckpointing(Callback):
    """Disables gradient checkpointing that is `auto` if a step fits the memory without it.

    What gradients, the optimizer's states and the activations of the first batch need is computed
    from tensor shapes and compared with the memory that is free once the weights are loaded.
    Recomputed activations are equal to the last bit, and what the denoiser keeps between forwards
    is restored, so that the choice changes no loss and a resumed run may make another one. All
    ranks make the same. The command line adds it to every `fit`.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose, before the first step."""
        if (
            not isinstance(pl_module, Learner)
            or not pl_module.backbone.policy.checkpoints_by_memory
        ):
            return
        policy: Any = pl_module.backbone.policy
        policy.checkpoints_by_memory = False
        if isinstance(trainer.strategy, FullStateStrategy):
            rank_zero_info("Gradient checkpointing is on, since weights are sharded.")
            return
        context = trainer.precision_plugin.forward_context
        try:
            with checkpointing(pl_module, False):
                parts = footprint(pl_module, forward_activations(pl_module, batch, context))
        except RuntimeError as error:  # a method of one's own reads numbers, or an operator cannot
            rank_zero_info(
                "Gradient checkpointing is on, since what a step needs cannot be computed from "
                f"tensor shapes ({first_line(error)})."
            )
            return
        needed = parts.gradients + parts.states + parts.activations
        if trainer.world_size > 1:
            needed += parts.gradients  # in the buckets in which ranks exchange them
        free = free_bytes(pl_module.device)
        if pl_module.device.type == "cpu":
            free //= trainer.num_devices  # they share the host's memory
        if trainer.strategy.reduce_boolean_decision(needed < FITS * free, all=True):
            policy.denoiser.disable_gradient_checkpointing()
            rank_zero_info(
                f"Gradient checkpointing is off: a step needs {needed / GIB:.2f} of the "
                f"{free / GIB:.2f} GiB that are free."
            )
            return
        rank_zero_info(
            f"Gradient checkpointing is on: a step without it would need {needed / GIB:.2f} GiB, "
            f"and {free / GIB:.2f} are free."
        )

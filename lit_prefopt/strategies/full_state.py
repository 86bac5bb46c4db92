"""Base class of sharding strategies: full checkpoints, equal to those of a single device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prefopt.backbones.policy import trained
from lit_prefopt.errors import InputError

Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")


class FullStateStrategy(ParallelStrategy):
    """Shards weights and moments in training, and reads and writes unsharded checkpoints.

    A checkpoint is the same file as that of a single device: the full trained weights and AdamW's
    moments. So any strategy on any number of ranks can resume from it, it is read without
    unpickling, and `export` accepts it. Tensors are gathered one by one on rank zero's host, which
    needs 12 bytes of memory per trained weight. When training ends, rank zero has the full module
    on the CPU, for export and evaluation.
    """

    # Defined by subclasses ----------------------------------------------------------------------

    @abstractmethod
    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return a full weight as used in the forward; a collective call."""

    @abstractmethod
    def full_moment(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        """Return a full moment of a weight; a collective call."""

    @abstractmethod
    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a weight, and the optimizer's copy of it."""

    @abstractmethod
    def set_moment(self, parameter: nn.Parameter, name: Moment, value: Tensor) -> None:
        """Set an existing moment of a weight."""

    @abstractmethod
    def states(self) -> list[dict[str, Any]]:
        """Return AdamW's states of this rank's shards; empty ones before the first step."""

    @abstractmethod
    def init_states(self, step: Tensor) -> None:
        """Initialize moments of zero, at a given step."""

    @abstractmethod
    def unshard(self) -> None:
        """Gather the full module on rank zero's CPU."""

    # Checkpoints --------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer's state: yes."""
        return True

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        assert self.lightning_module is not None
        return trained(self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full trained weights on rank zero, and an empty dict elsewhere."""
        return self._collected(self.trained(), self.full_parameter)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return AdamW's state in torch's own format, on rank zero."""
        parameters = dict(enumerate(self.trained().values()))
        states = [state for state in self.states() if state]
        moments = {
            name: self._collected(parameters, partial(self.full_moment, name=name))
            for name in (MOMENTS if states else ())
        }
        [group] = optimizer.param_groups
        plain = {key: value for key, value in group.items() if key != "params"}
        state = {
            number: {
                "step": states[0]["step"].to("cpu", copy=True),  # not shared
                **{name: moments[name][number] for name in MOMENTS},
            }
            for number in (parameters if states and self.is_global_zero else ())
        }
        return {"state": state, "param_groups": [{**plain, "params": [*parameters]}]}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file (rank zero)."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights."""
        for name, parameter in self.trained().items():
            self.set_parameter(parameter, checkpoint["state_dict"][name])

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load AdamW's state, written by any strategy."""
        [saved], [optimizer] = checkpoint["optimizer_states"], self.optimizers
        [group], [own] = saved["param_groups"], optimizer.param_groups
        own.update({key: value for key, value in group.items() if key != "params"})
        if not saved["state"]:
            return
        if any(set(state) != {"step", *MOMENTS} for state in saved["state"].values()):
            raise InputError(
                "The checkpoint's optimizer is not AdamW, the only one that can be sharded: resume "
                "without a sharding strategy."
            )
        self.init_states(saved["state"][0]["step"])
        for number, parameter in enumerate(self.trained().values()):
            for name in MOMENTS:
                self.set_moment(parameter, name, saved["state"][number][name])

    def _collected(
        self, parameters: Mapping[Any, nn.Parameter], whole: Callable[[nn.Parameter], Tensor]
    ) -> dict[Any, Tensor]:
        """Gather a full tensor of each parameter on rank zero's host."""
        held = {}
        for key, parameter in parameters.items():
            value = whole(parameter).detach()
            if self.is_global_zero:
                held[key] = value.to("cpu", copy=True)
        return held

    def own_step(self, step: Tensor, device: torch.device) -> Tensor:
        """Return a copy of AdamW's step count, on the device of the moments if it is fused."""
        fused = self.optimizers[0].param_groups[0].get("fused")
        return step.to(device if fused else "cpu", copy=True)

    # The run ------------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer) -> None:
        """Raise InputError unless this is a training run.

        Raises:
            InputError: It is a validation, a test or a prediction.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            raise InputError(
                f"{type(self).__name__} is only for `fit`: omit it here, its checkpoints are read "
                "without it."
            )

    def on_train_end(self) -> None:
        """Gather the full module."""
        self.unshard()


def check_adamw(optimizer: Optimizer) -> None:
    """Raise InputError for optimizers that are not elementwise or have states of other shapes.

    Raises:
        InputError: It is not torch's AdamW.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise InputError(
            f"{type(optimizer).__name__} cannot be sharded, only AdamW: set `--model.optimizer "
            "AdamW` (its moments are sharded), or use `--trainer "
            "hardware/ddp.yaml`."
        )

"""What strategies that shard have in common: checkpoints as whole as those of one device."""

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
    """Shards weights and moments in training, and writes and reads them as if it did not.

    A checkpoint is the file that a run on one device writes: the trained weights and AdamW's
    moments, each whole. So any strategy on any number of ranks goes on from it, it is read without
    unpickling, and `export` takes it. They are collected one by one on rank zero's host, which
    needs room for 12 bytes per trained weight. When training ends, rank zero holds the module
    whole, on the CPU, for exports and the evaluation.
    """

    # What a subclass says -----------------------------------------------------------------------

    @abstractmethod
    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight as the forward sees it, whole; all ranks call this together."""

    @abstractmethod
    def full_moment(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        """Return one of its moments, whole; all ranks call this together."""

    @abstractmethod
    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a weight, and what the optimizer steps from."""

    @abstractmethod
    def set_moment(self, parameter: nn.Parameter, name: Moment, value: Tensor) -> None:
        """Set one of its moments, which exists."""

    @abstractmethod
    def states(self) -> list[dict[str, Any]]:
        """Return AdamW's states of this rank's shards; empty ones before the first step."""

    @abstractmethod
    def init_states(self, step: Tensor) -> None:
        """Let moments of zero exist, after so many steps."""

    @abstractmethod
    def unshard(self) -> None:
        """Leave the module whole on rank zero's CPU."""

    # Checkpoints --------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning hand the optimizer's state over."""
        return True

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        assert self.lightning_module is not None
        return trained(self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is trained, whole on rank zero and nothing elsewhere."""
        return self._collected(self.trained(), self.full_parameter)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return AdamW's state as torch's own would be, on rank zero."""
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
                "step": states[0]["step"].to("cpu", copy=True),  # shared, it would count for all
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
        """Return what the file holds."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take up what is trained."""
        for name, parameter in self.trained().items():
            self.set_parameter(parameter, checkpoint["state_dict"][name])

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up AdamW's state, of whatever strategy wrote it."""
        [saved], [optimizer] = checkpoint["optimizer_states"], self.optimizers
        [group], [own] = saved["param_groups"], optimizer.param_groups
        own.update({key: value for key, value in group.items() if key != "params"})
        if not saved["state"]:
            return
        if any(set(state) != {"step", *MOMENTS} for state in saved["state"].values()):
            raise InputError(
                "The checkpoint's optimizer is not AdamW, the only one that can be sharded: go on "
                "without a sharding strategy."
            )
        self.init_states(saved["state"][0]["step"])
        for number, parameter in enumerate(self.trained().values()):
            for name in MOMENTS:
                self.set_moment(parameter, name, saved["state"][number][name])

    def _collected(
        self, parameters: Mapping[Any, nn.Parameter], whole: Callable[[nn.Parameter], Tensor]
    ) -> dict[Any, Tensor]:
        """Return what all ranks together know of each parameter, on rank zero's host."""
        held = {}
        for key, parameter in parameters.items():
            value = whole(parameter).detach()
            if self.is_global_zero:
                held[key] = value.to("cpu", copy=True)
        return held

    # The run ------------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer) -> None:
        """Refuse what is no training.

        Raises:
            InputError: It is a validation, a test or a prediction.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            raise InputError(
                f"{type(self).__name__} is for `fit`: leave it away here, its checkpoints are read "
                "without it."
            )

    def on_train_end(self) -> None:
        """Hand the module back whole."""
        self.unshard()


def check_adamw(optimizer: Optimizer) -> None:
    """Refuse optimizers that do not act on each weight by itself, or keep states of other forms.

    Raises:
        InputError: It is not torch's AdamW.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise InputError(
            f"{type(optimizer).__name__} cannot be sharded, only AdamW can: set `--model.optimizer "
            "AdamW` (its moments are divided among the ranks), or take `--trainer "
            "hardware/ddp.yaml`."
        )

"""PyTorch's FSDP2: sharded weights, gradients and moments, gathered block by block."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_prefopt.backbones.nf4 import nf4_scales
from lit_prefopt.backbones.repeated_blocks import repeated_blocks
from lit_prefopt.errors import InputError
from lit_prefopt.strategies.full_state import FullStateStrategy, Moment, check_adamw


class FullySharded(FullStateStrategy, ModelParallelStrategy):
    """FSDP2: shards the weights of the denoiser and of its frozen copy over all devices.

    They are gathered block by block when needed. The optimizer must be AdamW.

    Args:
        timeout: Time-out of collective operations.
        process_group_backend: Communication backend; by default nccl on GPUs.
    """

    def __init__(
        self,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._before: list[tuple[nn.Module, str, nn.Module]] = []

    def setup_environment(self) -> None:
        """Shard over all ranks of all nodes; Lightning's default is one shard per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Move the module to the devices, and check that all trained weights are sharded."""
        self.check_run(trainer)
        whole = [name for name, p in self.trained().items() if not isinstance(p, DTensor)]
        if whole:
            raise InputError(
                f"{whole[0]} is trained here, but FullySharded shards only a denoiser: "
                "use `--trainer hardware/ddp.yaml`."
            )
        super().setup(trainer)
        for optimizer in self.optimizers:
            check_adamw(optimizer)

    def shard(self, owner: nn.Module, name: str) -> None:
        """Shard a network over the devices, block by block; once.

        Args:
            owner: The module that contains it.
            name: Name of its attribute.

        Raises:
            InputError: Its weights are in 4 bits.
        """
        net = getattr(owner, name)
        if net is None or isinstance(net, FSDPModule):
            return
        if any(nf4_scales(weight) for weight in net.parameters()):
            raise InputError(
                "FullySharded cannot shard weights in 4 bits: set `--backbone.quantization int8`, "
                "which it can, or use `--trainer hardware/zero3.yaml`."
            )
        self._before.append((owner, name, _without_weights(net)))
        mesh: DeviceMesh = self.device_mesh["data_parallel"]
        for block in blocks(net):
            fully_shard(block, mesh=mesh)
        # The outermost too: it would stay unsharded after a validation, and its parameters would
        # then differ from the optimizer's.
        fully_shard(net, mesh=mesh, reshard_after_forward=True)

    # Weights and moments ------------------------------------------------------------------------

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight, gathered from all ranks' shards."""
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data

    def full_moment(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        """Return a moment, gathered from all ranks' shards."""
        return self.optimizers[0].state[parameter][name].full_tensor()

    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set this rank's shard of a weight."""
        _fill(parameter, value)

    def set_moment(self, parameter: nn.Parameter, name: Moment, value: Tensor) -> None:
        """Set this rank's shard of a moment."""
        _fill(self.optimizers[0].state[parameter][name], value)

    def states(self) -> list[dict[str, Any]]:
        """Return AdamW's states."""
        return [self.optimizers[0].state.get(p, {}) for p in self.trained().values()]

    def init_states(self, step: Tensor) -> None:
        """Initialize moments of zero."""
        for p in self.trained().values():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizers[0].state[p] = {"step": self.own_step(step, p.device), **moments}

    @torch.no_grad()
    def unshard(self) -> None:
        """Replace sharded networks by copies without hooks, with the full weights."""
        for owner, name, plain in self._before:
            net = getattr(owner, name)
            state = {
                key: self.full_parameter(value).cpu() for key, value in net.state_dict().items()
            }
            if self.is_global_zero:
                plain.load_state_dict(state, assign=True)
                setattr(owner, name, plain.train(net.training))
        self._before = []


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return the blocks to shard, inner ones first: transformer blocks, then a UNet's stages.

    Args:
        net: A denoiser.
    """
    outer = [m for name in ("down_blocks", "up_blocks") for m in getattr(net, name, ())]
    middle = getattr(net, "mid_block", None)
    return repeated_blocks(net) + outer + ([] if middle is None else [middle])


def _fill(shard: Tensor, value: Tensor) -> None:
    assert isinstance(shard, DTensor)
    here = value.to(shard.device, shard.dtype)
    shard.copy_(distribute_tensor(here, shard.device_mesh, shard.placements))


def _without_weights(net: nn.Module) -> nn.Module:
    """Return a copy with weights on the meta device."""
    light: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in net.parameters()
    }
    return copy.deepcopy(net, light)

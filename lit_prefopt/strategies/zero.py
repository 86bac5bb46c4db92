"""DeepSpeed's ZeRO (arXiv 1910.02054), with the same losses as DDP."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prefopt.errors import InputError
from lit_prefopt.strategies.full_state import FullStateStrategy, Moment, check_adamw

BUCKET = 200_000_000  # DeepSpeed's and Lightning's default is 2e8 to 5e8 elements
NEVER = 1_000_000_000


class ZeROPrecision(DeepSpeedPrecision):
    """Mixed precision as in other strategies: float32 weights under autocast, unchanged batches.

    DeepSpeed's own precision casts the whole module to bf16, including the LoRA, and Lightning's
    casts the batch, including noise levels.

    Args:
        precision: `32-true` or `bf16-mixed`.
    """

    def __init__(self, precision: str) -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise InputError(
                f"ZeRO supports bf16-mixed or 32-true, not {precision}: set "
                "`--trainer.precision bf16-mixed`."
            )
        super().__init__("32-true")  # the precision that DeepSpeed gets
        self.mixed = precision == "bf16-mixed"
        self.reading: Callable[[], AbstractContextManager] = nullcontext

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return the module unchanged: frozen parts have their own precision."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Return the batch unchanged."""
        return data

    def tensor_init_context(self) -> AbstractContextManager:
        """Return a context without effect."""
        return nullcontext()

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Run the forward under bf16 autocast, with gathered weights."""
        from deepspeed.accelerator import get_accelerator

        device = get_accelerator().device_name()
        with torch.autocast(device, torch.bfloat16, enabled=self.mixed), self.reading():
            yield


class ZeRO(FullStateStrategy, DeepSpeedStrategy):
    """DeepSpeed's ZeRO: shards optimizer states, gradients and weights over the devices.

    Weights, moments and accumulated gradients are float32 and frozen weights keep their precision,
    so losses are those of DDP. The optimizer must be AdamW.

    Args:
        stage: 1 shards the moments, 2 also the gradients, 3 also all weights, including frozen
            ones, which are then gathered layer by layer.
        offload_optimizer: Keep moments and optimizer weights on the host, and step there.
        offload_parameters: With stage 3, keep the sharded weights on the host.
        bucket: Elements per communication; fewer need less memory.
        timeout: Time-out of collective operations.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket: int = BUCKET,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                "ZeRO needs DeepSpeed: `pip install lit-prefopt[deepspeed]`, or use `--trainer "
                "hardware/fsdp.yaml`."
            )
        if offload_parameters and stage != 3:
            raise InputError("offload_parameters needs stage 3: set `stage` to 3, or omit it.")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            allgather_bucket_size=bucket,
            reduce_bucket_size=bucket,
            logging_batch_size_per_gpu=1,  # or Lightning would open the data for it
            timeout=timeout,
        )
        self.stage = stage
        self.config: dict[str, Any]
        # torch's AdamW also steps on the host, without the compiler that DeepSpeed's needs
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["steps_per_print"] = NEVER

    # Precision and accumulation -----------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Precision plugin of this strategy."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, ZeROPrecision):
            plugin = ZeROPrecision(plugin.precision)
        self._precision_plugin = plugin

    def _format_config(self) -> None:
        super()._format_config()
        self.config["gradient_accumulation_steps"] = 1  # Lightning already divides the loss
        if getattr(self.precision_plugin, "mixed", False):
            # within a step, DeepSpeed disables every other autocast
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.config["torch_autocast"] = autocast

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Return False, so that Lightning counts: it also steps at the end of an epoch."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate the gradients of the block without a step."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Take an optimizer step after this batch."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    # Weights and moments ------------------------------------------------------------------------

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight as used in the forward."""
        if self.stage < 3:
            return parameter.data
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def full_moment(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        """Return a moment, gathered from all ranks' shards."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name)

    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a weight, and the optimizer's copy of it."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = value.to(self.root_device)
        if self.stage < 3:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, self._mine(parameter, value))

    def set_moment(self, parameter: nn.Parameter, name: Moment, value: Tensor) -> None:
        """Set this rank's shard of a moment."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, name)
        else:
            safe_set_local_optimizer_state(parameter, self._mine(parameter, value), name)

    def _mine(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this rank's shard of a full tensor, padded with zeros."""
        size = parameter.ds_tensor.ds_numel
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded[size * self.global_rank :][:size]

    def states(self) -> list[dict[str, Any]]:
        """Return AdamW's states of the flat shards."""
        inner = self._sharded.optimizer
        return [inner.state.get(flat, {}) for flat in self._flats]

    def init_states(self, step: Tensor) -> None:
        """Initialize moments of zero."""
        sharded = self._sharded
        for flat in self._flats:
            moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            sharded.optimizer.state[flat] = {"step": self.own_step(step, flat.device), **moments}
        if self.stage < 3:
            sharded._hp_optimizer_states_linked = False
            sharded._lazy_init_hp_params_optimizer_state()

    @property
    def _sharded(self) -> Any:
        """DeepSpeed's optimizer (untyped)."""
        return self.deepspeed_engine.optimizer

    @property
    def _flats(self) -> list[Tensor]:
        """Flat parameters of torch's AdamW: this rank's shards of all weights, concatenated."""
        name = (
            "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_partitioned_groups_flat"
        )
        return list(getattr(self._sharded, name))

    # The run ------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Check that the devices are GPUs, and set up the process group."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise InputError(
                "ZeRO needs CUDA GPUs, and this run has none: set `--trainer.accelerator gpu` "
                "if there are some, or use `--trainer hardware/ddp.yaml`."
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Set up DeepSpeed's engine and shards."""
        self.check_run(trainer)
        super().setup(trainer)
        if self.stage == 3 and isinstance(self.precision_plugin, ZeROPrecision):
            self.precision_plugin.reading = self._reading

    @contextmanager
    def _reading(self) -> Generator[None, None, None]:
        """Gather weights that are read outside their layer's forward.

        DeepSpeed does so only within a step, but roll-outs and grids are sampled between steps.
        """
        assert self.lightning_module is not None
        every: list[Any] = [module._parameters for module in self.lightning_module.modules()]
        tables = [table for table in every if hasattr(table, "_in_forward")]  # DeepSpeed's
        for table in tables:
            table._in_forward = True
        yield
        for table in tables:
            table._in_forward = False

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, schedule = super()._init_optimizers()
        check_adamw(optimizer)
        return optimizer, schedule

    @torch.no_grad()
    def unshard(self) -> None:
        """Gather all weights on rank zero, and remove DeepSpeed's hooks."""
        assert self.lightning_module is not None
        owners = [m for m in self.lightning_module.modules() if m._parameters]
        for owner in owners if self.stage == 3 else ():
            for name, parameter in [*owner._parameters.items()]:
                if parameter is not None:
                    value = self.full_parameter(parameter)
                    if self.is_global_zero:
                        plain = nn.Parameter(value.cpu(), parameter.requires_grad)
                        owner._parameters[name] = plain
        if isinstance(self.precision_plugin, ZeROPrecision):
            self.precision_plugin.reading = nullcontext
        self._sharded.destroy()
        self.model = self.lightning_module

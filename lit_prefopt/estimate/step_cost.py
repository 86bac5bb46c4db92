"""Compute FLOPs and memory of a training step from tensor shapes alone.

It runs on fake tensors without allocation, so it also works for models that do not fit.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary

from lit_prefopt.backbones import trained
from lit_prefopt.backbones.nf4 import nf4_scales
from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.diffusion.encoding import encode_posteriors
from lit_prefopt.estimate.restore import parts_with_state, restored, without_cached_results
from lit_prefopt.learner import Learner

Context = Callable[[], AbstractContextManager[Any]]
"""Returns the context of a step, such as mixed precision."""


class StepCost(NamedTuple):
    """Cost of one forward and backward."""

    flops: int
    activations: int
    """Peak bytes in addition to weights, gradients and optimizer states."""


def step_cost(module: Learner, batch: Any, context: Context = nullcontext) -> StepCost:
    """Compute the cost of a training step, including recomputation.

    Args:
        module: The method; neither it nor its weights change.
        batch: A batch of its data module, on the module's device.
        context: Context of the step.
    """
    parameters = [*trained(module).values()]
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    with _fake_tensors(module, batch) as (ghost, known):
        live = _LiveMemory(known)
        with _fast_garbage_collection(), flop_counter() as counter, live, _MostTokens(), context():
            loss: Any = module.training_step(ghost, 0)
            forward = live.peak
            torch.autograd.grad(loss, parameters, allow_unused=True)
        # old gradients are freed after the forward, before the new ones are allocated
        return StepCost(counter.get_total_flops(), max(forward, live.peak - gradients))


def forward_activations(module: Learner, batch: Any, context: Context = nullcontext) -> int:
    """Compute the peak bytes of a training step's forward, in half of the time of `step_cost`.

    Without gradient checkpointing the peak of the whole step is little higher: the backward pass
    frees activations as it goes.

    Args:
        module: The method; neither it nor its weights change.
        batch: A batch of its data module, on the module's device.
        context: Context of the step.
    """
    with _fake_tensors(module, batch) as (ghost, known):
        live = _LiveMemory(known)
        with _fast_garbage_collection(), live, _MostTokens(), context():
            loss: Any = module.training_step(ghost, 0)
            del loss
    return live.peak


def encoded_pairs(module: Learner, batch: ImagePairs) -> LatentPairs:
    """Return the shapes of what a cache would hold of a batch of images, as fake tensors.

    Args:
        module: The method; neither it nor its weights change.
        batch: A batch of images, on the module's device.
    """
    with _fake_tensors(module, batch) as (ghost, _), _MostTokens():
        return encode_posteriors(module.backbone, ghost)


def flop_counter() -> FlopCounterMode:
    """Return a counter of FLOPs that includes attention on CPUs, which torch's own leaves out."""
    ops = torch.ops.aten
    formulas = {
        ops._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(*shapes: Any, **_: Any) -> int:
    return int(sdpa_flop_count(*shapes[:3]))  # query, key, value


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return int(sdpa_backward_flop_count(*shapes[:4]))  # of the output's gradient as well


@contextmanager
def checkpointing(module: Learner, on: bool) -> Iterator[None]:
    """Enable or disable gradient checkpointing of the denoiser inside the block."""
    denoiser: Any = module.backbone.policy.denoiser
    before = denoiser.is_gradient_checkpointing
    _set_checkpointing(denoiser, on)
    try:
        yield
    finally:
        _set_checkpointing(denoiser, before)


def _set_checkpointing(denoiser: Any, on: bool) -> None:
    (denoiser.enable_gradient_checkpointing if on else denoiser.disable_gradient_checkpointing)()


@contextmanager
def _fake_tensors(module: Learner, batch: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """Yield the batch and the module's tensors as fake tensors.

    Changes of the module and its networks are undone afterwards, tables that they compute at their
    first forward included; compiled blocks run uncompiled.
    """
    process = module.backbone.process
    scheduler = getattr(process, "scheduler", process)
    touched = [module, module.window, process, scheduler, *parts_with_state(module.backbone)]
    held = [*module.parameters(), *module.buffers()]
    # both may be on fake tensors already
    mode = detect_fake_mode((held, batch)) or FakeTensorMode(allow_non_fake_inputs=True)

    def shape(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    with (
        restored({id(x): x for x in touched}.values()),
        without_cached_results(module.backbone),
        mode,
        torch.compiler.set_stance("force_eager"),
    ):
        known = [shape(tensor) for tensor in held]
        ghost = tree_map_only(Tensor, shape, batch)
        # The check of a first batch reads numbers; while it runs, `Budget` does not count.
        vars(module).update(base_to_check=False, checking_base=True)
        yield ghost._replace(seeds=batch.seeds.cpu()), known


@contextmanager
def _fast_garbage_collection() -> Iterator[None]:
    """Freeze existing objects, so that garbage collections inside the block are fast."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of the live outputs of operations.

    Args:
        known: Tensors that existed before.
    """

    PEAK_TOLERANCE = 0.01  # maximum underestimate of the peak, as a share of it

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = known[0].device
        self._before = [tensor.untyped_storage() for tensor in known]
        self._seen = {id(storage) for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device != self._device or id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.now += size
        weakref.finalize(storage, self._drop, id(storage), size)
        if self.now > self.peak * (1 + self.PEAK_TOLERANCE):
            gc.collect()  # free reference cycles, which would count until some later collection
            self.peak = max(self.peak, self.now)

    def _drop(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


class _MostTokens(TorchDispatchMode):
    """Returns the length of a mask where a network reads how many of its tokens are no padding.

    A fake tensor has no values: the cost is that of prompts of full length.
    """

    def __init__(self) -> None:
        super().__init__()
        self._most = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        most = self._most.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if most is not None and func is aten._local_scalar_dense.default:
            return most
        out = func(*args, **(kwargs or {}))
        if func is aten.sum.dim_IntList and not args[0].is_floating_point():
            self._most[out] = args[0].shape[args[1][0]]
        elif most is not None and func in (aten.select.int, aten.unbind.int):
            for part in [out] if isinstance(out, Tensor) else out:
                self._most[part] = most
        return out


def bytes_of(network: nn.Module | None) -> int:
    """Return the bytes of a network's weights, with the scales of those in 4 bits, and buffers."""
    if network is None:
        return 0
    scales = (x for p in network.parameters() for x in nf4_scales(p))
    held = (*network.parameters(), *network.buffers(), *scales)
    return sum(x.numel() * x.element_size() for x in held)

"""Where the time of an on-policy run goes: timers around its parts, which change no number of it.

Parts do not overlap: one that begins inside another stops the other's clock.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

COLLECTION, TRAINING, ELSE = "collection", "training", "checkpoints, logs, loops"
DENOISER, JUDGE = "denoiser", "judge"
PARTS = (
    *(f"{COLLECTION}: {part}" for part in (DENOISER, "decode", JUDGE, "the rest")),
    *(f"{TRAINING}: {part}" for part in ("reference", "policy", "backward", "optimizer")),
    *(f"{TRAINING}: the rest", ELSE),
)


class Call(NamedTuple):
    """The first call of a network: enough to repeat it without numbers."""

    network: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    rows: int


class Parts(Callback):
    """Takes seconds, peak memory and rows of every part of an on-policy fit."""

    last: ClassVar[Parts]
    """The one of the last fit, for those who named it in a recipe."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)  # GiB
        self.rows: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.calls: dict[str, Call] = {}
        self._open: list[str] = []
        self._since = 0.0

    # The clock ----------------------------------------------------------------------------------

    def begin(self, part: str) -> None:
        """Stop the clock of the part that runs, and start this one's."""
        self._lap()
        self._open.append(part)

    def end(self, part: str) -> None:
        """Stop this part's clock, and go on with the one around it."""
        self._lap()
        ended = self._open.pop()
        assert ended == part, f"{ended} is open, not {part}"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def _lap(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] += now - self._since
            self.peaks[name] = max(self.peaks[name], peak_since_reset())
        reset_peak()
        self._since = time.perf_counter()

    # Where it is started and stopped ------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put timers around what the method calls."""
        module: Any = pl_module
        module.collect = self._timed(module.collect, f"{COLLECTION}: the rest")
        module.backbone.preview = self._timed(module.backbone.preview, f"{COLLECTION}: decode")
        module.judge.score = self._timed(module.judge.score, f"{COLLECTION}: {JUDGE}")
        networks = {module.backbone.policy.net}
        with module.backbone.as_reference():
            networks.add(module.backbone.policy.net)  # the same one, or a frozen copy
        for net in networks:
            self._watch(net, DENOISER)
            net.register_forward_pre_hook(lambda *_: self.begin(self._active_network()))
            net.register_forward_hook(lambda *_: self.end(self._open[-1]))
        small = module.backbone.small_decoder
        self._watch((module.backbone.vae if small is None else small.tiny).decoder, "decoder")
        clip = getattr(module.judge, "clip", None)  # loads it, before the clock runs
        if clip is not None:
            self._watch(clip.vision_model, "judge (images)")
            self._watch(clip.text_model, "judge (texts)")
        Parts.last = self

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self.begin(ELSE)

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        self.begin(f"{TRAINING}: the rest")

    def on_before_backward(self, *_: Any) -> None:
        """Begin the backward pass."""
        self.begin(f"{TRAINING}: backward")

    def on_after_backward(self, *_: Any) -> None:
        """End it."""
        self.end(f"{TRAINING}: backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Begin clipping and the update."""
        self.begin(f"{TRAINING}: optimizer")

    def on_train_batch_end(self, *_: Any) -> None:
        """End the step."""
        if self._open[-1] == f"{TRAINING}: optimizer":
            self.end(self._open[-1])
        self.end(f"{TRAINING}: the rest")

    def on_train_end(self, *_: Any) -> None:
        """Stop."""
        self.end(ELSE)

    def _active_network(self) -> str:
        if self._open[-1].startswith(COLLECTION):
            return f"{COLLECTION}: {DENOISER}"
        return f"{TRAINING}: {'policy' if torch.is_grad_enabled() else 'reference'}"

    def _timed(self, function: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def _watch(self, network: nn.Module, name: str) -> None:
        def note(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
            rows = len(tensors[0])
            part = self._active_network() if name == DENOISER else self._open[-1]
            self.rows[name][part] += rows
            if name not in self.calls:
                args, kwargs = tree_map(_without_numbers, (args, kwargs))
                self.calls[name] = Call(network, args, kwargs, rows)

        network.register_forward_pre_hook(note, with_kwargs=True, prepend=True)

    # What it comes to ---------------------------------------------------------------------------

    def teraflops(self) -> dict[str, float]:
        """Return the work of the networks in every part; they hold no numbers afterwards."""
        work: dict[str, float] = defaultdict(float)
        for name, call in self.calls.items():
            forward, backward = _teraflops_of_a_row(call)
            for part, rows in self.rows[name].items():
                work[part] += rows * forward
                if part == f"{TRAINING}: policy":
                    work[f"{TRAINING}: backward"] += rows * backward
        return work


def _without_numbers(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    dtype = torch.float32 if x.is_floating_point() else x.dtype
    return torch.empty_like(x, dtype=dtype, device="meta")


def _teraflops_of_a_row(call: Call) -> tuple[float, float]:
    """Return the work of one row's forward, and of its backward with all that is made again."""
    network = nn.Module.to(call.network, "meta", torch.float32)  # a UNet's own warns of something
    for hooks in (network._forward_pre_hooks, network._forward_hooks):
        hooks.clear()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        network(*call.args, **call.kwargs)
    trained = any(p.requires_grad for p in network.parameters())
    if not trained:
        return forward.get_total_flops() / call.rows / 1e12, 0.0
    with FlopCounterMode(display=False) as both:
        output = network(*call.args, **call.kwargs)
        getattr(output, "sample", output).sum().backward()
    counts = [counter.get_total_flops() / call.rows / 1e12 for counter in (forward, both)]
    return counts[0], counts[1] - counts[0]


def reset_peak() -> None:
    """Let the peak be counted from now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> float:
    """Return the peak in GiB: of the device, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20

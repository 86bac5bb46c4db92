"""Record what passes between the parts of a pipeline, and compare two recordings.

with Recorder(parts_of(pipeline)) as theirs:
    pipeline("a cat", num_inference_steps=4)
with Recorder({"transformer": (network, "forward")}) as ours:
    sample(...)
assert first_difference(ours, theirs, ["transformer"], results=False) is None
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

Parts = Mapping[str, tuple[object, str]]
"""Name in the recording -> object and the method that is recorded."""


@dataclass(frozen=True)
class Call:
    """One call of a recorded method, with copies of all tensors as they were at that moment.

    Args:
        part: Name in the recording.
        step: How many steps had ended before.
        arguments: By the names of the method's parameters, however they were passed; those left
            out have their defaults.
        result: What it returned.
    """

    part: str
    step: int
    arguments: dict[str, Any]
    result: Any


def parts_of(pipeline: DiffusionPipeline) -> dict[str, tuple[object, str]]:
    """Return what to record of any diffusers pipeline.

    These are the forwards of its networks (denoisers, text encoders, ...), `encode` and `decode`
    of its VAE in their place, and the scheduler's `step`.
    """
    parts: dict[str, tuple[object, str]] = {}
    for name, component in pipeline.components.items():
        if isinstance(component, SchedulerMixin):
            parts[f"{name}.step"] = component, "step"
        elif isinstance(component, nn.Module) and hasattr(component, "decode"):
            parts |= {f"{name}.{way}": (component, way) for way in ("encode", "decode")}
        elif isinstance(component, nn.Module):
            parts[name] = component, "forward"
    return parts


class Recorder:
    """Keeps every call of some methods while it is entered, and leaves them as they were.

    Args:
        parts: What to record, such as `parts_of(pipeline)`.
        ends_step: The part whose calls end a step.
    """

    def __init__(self, parts: Parts, ends_step: str = "scheduler.step") -> None:
        self.parts = dict(parts)
        self.ends_step = ends_step
        self.calls: list[Call] = []
        self.steps = 0

    def __enter__(self) -> Self:
        for name, (owner, method) in self.parts.items():
            owner.__dict__[method] = self._recorded(name, getattr(owner, method))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for owner, method in self.parts.values():
            del owner.__dict__[method]

    def of(self, part: str, step: int | None = None) -> list[Call]:
        """Return the calls of one part, in order; those of one step only, if it is given."""
        return [c for c in self.calls if c.part == part and step in (None, c.step)]

    def _recorded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)  # pipelines read the signatures of their parts
        def call(*values: Any, **named: Any) -> Any:
            bound = signature.bind(*values, **named)
            bound.apply_defaults()
            arguments = {key: copied(value) for key, value in bound.arguments.items()}
            step = self.steps
            result = method(*values, **named)
            self.calls.append(Call(name, step, arguments, copied(result)))
            self.steps += name == self.ends_step
            return result

        return call


def copied(value: Any) -> Any:
    """Return a copy of a value in which every tensor is a clone, however deep it lies.

    Objects such as a latent distribution become dictionaries of their attributes.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [copied(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return value
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return type(value).__name__
    return {key: copied(inner) for key, inner in vars(value).items()}


def first_difference(
    ours: Recorder,
    theirs: Recorder,
    parts: Iterable[str] | None = None,
    *,
    results: bool = True,
    tensors_only: bool = False,
    atol: float | None = None,
) -> str | None:
    """Compare two recordings call by call and return the first difference, None without any.

    Args:
        ours: One recording.
        theirs: The other.
        parts: Which parts; all by default. Other calls are passed over.
        results: Whether results are compared, or arguments alone.
        tensors_only: Whether only tensors are compared, not such arguments as `return_dict`.
        atol: Largest difference of values. By default every bit must be equal. Shapes and dtypes
            must be equal in any case.
    """
    names = sorted({*ours.parts, *theirs.parts}) if parts is None else list(parts)
    unknown = [name for name in names if name not in ours.parts or name not in theirs.parts]
    if unknown:
        raise KeyError(f"not in both recordings: {', '.join(unknown)}")
    left = [call for call in ours.calls if call.part in names]
    right = [call for call in theirs.calls if call.part in names]
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if (a.part, a.step) != (b.part, b.step):
            return f"call {i}: {a.part} of step {a.step} against {b.part} of step {b.step}"
        pairs = [("", a.arguments, b.arguments)]
        pairs += [(" result", a.result, b.result)] * results
        for kind, mine, other in pairs:
            for path, text in _differences(mine, other, tensors_only, atol):
                return f"{a.part} of step {a.step},{kind}{path}: {text}"
    if len(left) != len(right):
        longer = max(left, right, key=len)
        extra = longer[min(len(left), len(right))]
        return f"{len(left)} calls against {len(right)}; one has {extra.part} of step {extra.step}"
    return None


def _differences(
    ours: Any, theirs: Any, tensors_only: bool, atol: float | None, path: str = ""
) -> Iterator[tuple[str, str]]:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        text = _unequal(ours, theirs, atol)
        if text is not None:
            yield path, text
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            inner = ours.get(key), theirs.get(key)
            yield from _differences(*inner, tensors_only, atol, f"{path} {key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, inner in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*inner, tensors_only, atol, f"{path}[{i}]")
    elif tensors_only and not _holds_tensors(ours) and not _holds_tensors(theirs):
        return
    elif _holds_tensors(ours) or _holds_tensors(theirs) or ours != theirs:
        yield path, f"{_described(ours)} against {_described(theirs)}"


def _unequal(ours: Tensor, theirs: Tensor, atol: float | None) -> str | None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"{_described(ours)} against {_described(theirs)}"
    if atol is None:
        equal = torch.equal(_bytes(ours), _bytes(theirs))
    else:
        equal = torch.allclose(ours.double(), theirs.double(), rtol=0, atol=atol)
    if equal:
        return None
    distance = (ours.double() - theirs.double()).abs()
    return f"{_described(ours)}, largest difference {distance.max():.3g} at {_place(distance)}"


def _bytes(tensor: Tensor) -> Tensor:
    # `contiguous` keeps the stride 0 of an expanded axis of one row, which cannot be viewed
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _place(distance: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensors(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_holds_tensors(inner) for inner in value)
    return isinstance(value, Tensor)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list) and _holds_tensors(value):
        return f"list of {len(value)}"
    return "a dictionary" if isinstance(value, dict) else repr(value)

"""Load a UNet, a VAE or a text encoder from a .safetensors file, in the names that it is found in.

A file may be a whole checkpoint in the layout of the original release, or one component alone,
under original names or diffusers', with or without a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component, Entry, Layout
from lit_prefopt.families.lora_prefixes import DENOISER, role_of
from lit_prefopt.utils.meta import build_on_meta, on_meta
from lit_prefopt.weights.checks import check_weights, contents, missing_tensors, some_names

COUNTER = ".num_batches_tracked"
"""End of the name of a batch norm's counter, which evaluation does not read and files may lack."""

SCALED = ("scale_weight", "weight_scale", "scaled_fp8")
"""Ends of the keys of 8-bit files whose weights must be multiplied by scales."""


class WeightsFile:
    """An open .safetensors file: keys and shapes are known, tensors are read on demand.

    Args:
        path: The file.

    Raises:
        InputError: It does not exist or is no .safetensors file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; name a .safetensors file.")
        try:
            self._stream: Any = safe_open(path, "pt")
            self.keys: set[str] = set(self._stream.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors ({error}): name a complete .safetensors "
                "file; others (.ckpt, .pt, .bin) are never opened."
            ) from error
        if scaled := sorted(key for key in self.keys if key.endswith(SCALED)):
            raise InputError(
                f"{path} contains 8-bit weights with scales ({some_names(scaled, 1)}): use the "
                "model in float16, bfloat16 or float32."
            )

    def read(self, key: str) -> Tensor:
        """Read a tensor."""
        tensor: Tensor = self._stream.get_tensor(key)
        return tensor

    def empty(self) -> dict[str, Tensor]:
        """Return all tensors without their data, on the meta device."""
        shapes = {key: self._stream.get_slice(key).get_shape() for key in self.keys}
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def load_from_file(
    build: Callable[[], nn.Module],
    file: WeightsFile,
    component: Component,
    dtype: torch.dtype,
    architecture: str,
) -> nn.Module:
    """Load a component from a file.

    Args:
        build: Builds the network by its configuration; its initial weights are never allocated.
        file: A whole checkpoint, or the component alone.
        component: The component of its family.
        dtype: Precision of the weights.
        architecture: Source of the configuration, for messages.

    Raises:
        InputError: The file has no such component, lacks some of its tensors, has another
            architecture, or contains NaN.
    """
    if on_meta():
        return build_on_meta(build, dtype)
    with init_empty_weights():
        model = build()
    wanted = model.state_dict()
    name = component.name
    layout = max(_layouts(component, list(wanted)), key=lambda one: _matches(one, file))
    optional = {*component.identity, *(p for p in wanted if p.endswith(COUNTER))}
    implied = {p for p in optional if p in layout and layout[p].key not in file.keys}
    missing = sorted({e.key for p, e in layout.items() if p not in implied} - file.keys)
    if not _matches(layout, file):
        raise InputError(
            f"{file.path} has no {name} under names that are known here: it contains "
            f"{contents(file.keys)}; name a file that has one."
        )
    source = f"The {name} of {file.path}"
    if missing and _matches(layout, file) < len(layout) / 2:
        raise _other_architecture(file, architecture, f"{source} lacks {some_names(missing)}")
    if missing:
        raise missing_tensors(source, missing, len(layout))
    loaded = {}
    sizes = fused_sizes(layout, wanted)
    for parameter, tensor in wanted.items():
        if parameter in implied:
            loaded[parameter] = _implied(tensor, dtype)
            continue
        entry = layout[parameter]
        value = _stored(file.read(entry.key), entry, tensor.shape, sizes.get(entry.key, []))
        if value.shape != tensor.shape:
            difference = f"{entry.key} is {tuple(value.shape)} and should be {tuple(tensor.shape)}"
            raise _other_architecture(file, architecture, difference)
        loaded[parameter] = value.to(dtype if tensor.is_floating_point() else tensor.dtype)
    _warn_unused(file, component, layout)
    model.load_state_dict(loaded, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # an embedding that has two names
        if untied := _untied(model, layout):
            raise missing_tensors(source, untied, len(layout))
    model.eval()
    check_weights(model, source)
    return model


def _untied(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Return the output layer's weight, if it was read from the embedding and is not tied to it."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is words.weight:
        return []
    own = {name: entry.key for name, entry in layout.items()}
    names = [name for name, tensor in model.named_parameters() if tensor is head.weight]
    return [name for name in names if list(own.values()).count(own[name]) > 1]


def _implied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter that a file need not contain: the identity, or a counter at 0."""
    if tensor.ndim == 0:
        return torch.zeros((), dtype=tensor.dtype)
    return torch.eye(len(tensor), dtype=dtype)


def _other_architecture(file: WeightsFile, architecture: str, difference: str) -> InputError:
    return InputError(
        f"{file.path} does not fit the architecture of {architecture} ({difference}): name a "
        "pipeline of the same architecture as `--backbone.config` (`--base_config` of an export)."
    )


def _warn_unused(file: WeightsFile, component: Component, layout: Layout) -> None:
    """Warn of a denoiser's tensors that the architecture lacks; encoders may have unused layers."""
    used = {entry.key for entry in layout.values()}
    prefix = next(p for p in component.prefixes if all(key.startswith(p) for key in used))
    known = used | {prefix + name for name in component.ignored}
    unused = sorted(key for key in file.keys - known if key.startswith(prefix))
    if role_of(component.name) == DENOISER and unused:
        rank_zero_warn(
            f"{len(unused)} tensors of the {component.name} of {file.path} are not in its "
            f"architecture and not used ({some_names(unused)}): check `--backbone.config`."
        )


def _matches(layout: Layout, file: WeightsFile) -> int:
    """Return how many of a network's parameters a file has under the names of a layout."""
    return sum(entry.key in file.keys for entry in layout.values())


def fused_sizes(layout: Mapping[str, Entry], shapes: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the rows of all pieces of each fused layer, by its key.

    Args:
        layout: Entries by the names of the parameters or layers.
        shapes: Tensors of the network by the same names, possibly on the meta device.
    """
    found: dict[str, dict[int, int]] = {}
    for name, entry in layout.items():
        if entry.piece is not None:
            found.setdefault(entry.key, {})[entry.piece] = len(shapes[name])
    return {key: [sizes[piece] for piece in sorted(sizes)] for key, sizes in found.items()}


def _stored(tensor: Tensor, entry: Entry, shape: torch.Size, sizes: list[int]) -> Tensor:
    """Return a tensor as the network stores it; a fused one of other sizes is left as it is."""
    if entry.piece is not None and len(tensor) == sum(sizes):
        tensor = tensor.split(sizes)[entry.piece].clone()
    if entry.transposed:
        tensor = tensor.T.contiguous()
    if entry.swapped and len(tensor) % 2 == 0:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    # the original code's attention layers of a VAE are convolutions, those of later files are not
    squeezed = tensor.ndim != len(shape) and {*tensor.shape[2:], *shape[2:]} <= {1}
    return tensor.reshape(shape) if squeezed and tensor.numel() == shape.numel() else tensor


def _layouts(component: Component, parameters: list[str]) -> Iterator[Layout]:
    """Yield all layouts in which files store a component."""
    for prefix in component.prefixes:
        for names in component.layouts(parameters):
            yield {
                parameter: entry._replace(key=prefix + entry.key)
                for parameter, entry in names.items()
            }


def original_state(net: nn.Module, component: Component) -> dict[str, Tensor]:
    """Return a network's weights with the keys of the original release's single file.

    Args:
        net: The network.
        component: The component of its family.
    """
    state = net.state_dict()
    layout = component.original(list(state))
    fused: dict[str, dict[int, Tensor]] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        entry = layout[name]
        key = component.prefixes[0] + entry.key
        if entry.piece is not None:
            fused.setdefault(key, {})[entry.piece] = tensor
            continue
        if entry.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if entry.transposed:
            tensor = tensor.T
        if entry.conv and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[key] = tensor
    return out | {key: torch.cat([parts[i] for i in sorted(parts)]) for key, parts in fused.items()}

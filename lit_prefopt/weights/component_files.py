"""Load a UNet, a VAE or a text encoder from a .safetensors file, in the names that it is found in.

A file may be a whole checkpoint in the layout of the original release, or one component alone,
under original names or diffusers', with or without a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.weights.checks import check_weights, contents, missing_tensors, some_names
from lit_prefopt.weights.ldm_names import open_clip_name, unet_names, vae_name

PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoder.", ""),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoder_2.", ""),
}
"""Prefixes of a component's keys, the whole checkpoints' first."""

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of a VAE's attention layers in early versions of diffusers."""

SCALED = ("scale_weight", "weight_scale", "scaled_fp8")
"""Ends of the keys of 8-bit files whose weights must be multiplied by scales."""


class Entry(NamedTuple):
    """Key of a parameter in a file, and how the file stores it."""

    key: str
    third: int | None = None  # of fused query, key and value
    transposed: bool = False


Layout = dict[str, Entry]
"""The file's entries by the parameters of the network."""


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
    name: str,
    dtype: torch.dtype,
    architecture: str,
) -> nn.Module:
    """Load a component from a file.

    Args:
        build: Builds the network by its configuration; its initial weights are never allocated.
        file: A whole checkpoint, or the component alone.
        name: The component's name in a pipeline.
        dtype: Precision of the weights.
        architecture: Source of the configuration, for messages.

    Raises:
        InputError: The file has no such component, lacks some of its tensors, has another
            architecture, or contains NaN.
    """
    with init_empty_weights():
        model = build()
    wanted = model.state_dict()
    layout = max(_layouts(name, list(wanted)), key=lambda one: _matches(one, file))
    missing = sorted({entry.key for entry in layout.values()} - file.keys)
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
    for parameter, tensor in wanted.items():
        entry = layout[parameter]
        value = _stored(file.read(entry.key), entry, tensor.shape)
        if value.shape != tensor.shape:
            difference = f"{entry.key} is {tuple(value.shape)} and should be {tuple(tensor.shape)}"
            raise _other_architecture(file, architecture, difference)
        loaded[parameter] = value.to(dtype if tensor.is_floating_point() else tensor.dtype)
    _warn_unused(file, name, layout)
    model.load_state_dict(loaded, assign=True)
    model.eval()
    check_weights(model, source)
    return model


def _other_architecture(file: WeightsFile, architecture: str, difference: str) -> InputError:
    return InputError(
        f"{file.path} does not fit the architecture of {architecture} ({difference}): name a "
        "pipeline of the same architecture as `--backbone.config` (`--base_config` of an export)."
    )


def _warn_unused(file: WeightsFile, name: str, layout: Layout) -> None:
    """Warn of a UNet's tensors that the architecture lacks; encoders may have unused layers."""
    used = {entry.key for entry in layout.values()}
    prefix = next(p for p in PREFIXES[name] if all(key.startswith(p) for key in used))
    unused = sorted(key for key in file.keys - used if key.startswith(prefix))
    if name == "unet" and prefix and unused:
        rank_zero_warn(
            f"{len(unused)} tensors of the UNet of {file.path} are not in its architecture and not "
            f"used ({some_names(unused)}): check `--backbone.config`."
        )


def _matches(layout: Layout, file: WeightsFile) -> int:
    """Return how many of a network's parameters a file has under the names of a layout."""
    return sum(entry.key in file.keys for entry in layout.values())


def _stored(tensor: Tensor, entry: Entry, shape: torch.Size) -> Tensor:
    """Return a tensor as the network stores it."""
    if entry.third is not None and len(tensor) % 3 == 0:
        tensor = tensor.chunk(3)[entry.third].clone()
    if entry.transposed:
        tensor = tensor.T.contiguous()
    # the original code's attention layers of a VAE are convolutions, those of later files are not
    squeezed = tensor.ndim != len(shape) and {*tensor.shape[2:], *shape[2:]} <= {1}
    return tensor.reshape(shape) if squeezed and tensor.numel() == shape.numel() else tensor


def _layouts(name: str, parameters: list[str]) -> Iterator[Layout]:
    """Yield all layouts in which files store a component."""
    for prefix in PREFIXES[name]:
        for names in _namings(name, parameters):
            yield {
                parameter: entry._replace(key=prefix + entry.key)
                for parameter, entry in names.items()
            }


def _namings(name: str, parameters: list[str]) -> Iterator[Layout]:
    """Yield the layouts of a component without prefix."""
    if name == "unet":
        original = unet_names(parameters)
        yield {p: Entry(original[p]) for p in parameters}
        yield {p: Entry(p) for p in parameters}
    elif name == "vae":
        numbers = [
            int(m[1]) for p in parameters if (m := re.match(r"decoder\.up_blocks\.(\d+)", p))
        ]
        yield {p: Entry(vae_name(p, 1 + max(numbers))) for p in parameters}
        yield {p: Entry(p) for p in parameters}
        yield {p: Entry(_old_vae_name(p)) for p in parameters}
    else:
        inner = {p: p.removeprefix("text_model.") for p in parameters}
        for start in ("transformer.", ""):
            # early files, and what was merged from them, have no `text_model.`
            for middle in ("text_model.", ""):
                yield {
                    p: Entry(start + (n if n.startswith("text_projection") else middle + n))
                    for p, n in inner.items()
                }
        for start in ("model.", ""):
            yield {p: _open_clip(n, start) for p, n in inner.items()}


def _old_vae_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    for new, old in OLD_VAE.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _open_clip(name: str, prefix: str) -> Entry:
    """Return the entry of a text encoder's parameter in OpenCLIP's layout."""
    if name == "text_projection.weight":
        return Entry(f"{prefix}text_projection", transposed=True)
    if found := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
        layer, letter, kind = found.groups()
        key = f"{prefix}{open_clip_name(layer)}.attn.in_proj_{kind}"
        return Entry(key, third="qkv".index(letter))
    return Entry(prefix + open_clip_name(name))

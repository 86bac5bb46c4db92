"""Read LoRA files in the layouts of diffusers, kohya, peft, ComfyUI and OneTrainer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.families.lora_prefixes import COMPONENTS, DENOISER, role_of
from lit_prefopt.weights.checks import check_finite, contents, some_names
from lit_prefopt.weights.lora_keys import (
    Adapter,
    adapter_alpha,
    file_adapters,
    layer_tensors,
    peft_adapter,
)

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name of a LoRA in diffusers."""

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""File names of a LoRA in peft."""

FILES = (WEIGHTS, PEFT_WEIGHTS, *(f"{part}/{PEFT_WEIGHTS}" for part in COMPONENTS))
"""Places of LoRAs in a folder; peft has a folder per component."""

BUNDLED = "bundle_emb."
"""Prefix of the embeddings that OneTrainer saves beside a LoRA."""

OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"lora_mid": "a LoRA with a Tucker decomposition",
    r"hada_[wt]": "a LoHa",
    r"lokr_[wt]": "a LoKr",
    r"oft_|lora_boft": "an OFT",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.diff(_b)?$|[wb]_norm$": "a difference of weights",
    r"lora_(A|B|down|up)(\.\w+)?\.bias$|lora_bias": "a LoRA with biases",
    r"lora_embedding_": "a LoRA of embeddings",
}
"""Regular expressions of the keys of other adapters, which are never read as a LoRA."""


ADAPTER = re.compile(r"lora|hada_[wt]|lokr_[wt]|dora_scale|\.diff(_b)?$")
"""Keys that only files of adapters have, of this kind or of others."""

NO_NUMBERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
"""Types of tensors that are no alpha."""

STATED = ("modelspec.architecture", "ss_base_model_version")
"""Metadata that name the model that a LoRA was trained on."""


class LoRALayer(NamedTuple):
    """The low-rank update of one layer: alpha / rank times `up` times `down`."""

    down: Tensor  # (rank, inputs), of a convolution (rank, inputs, height, width)
    up: Tensor  # (outputs, rank), of a convolution (outputs, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.down)

    @property
    def delta(self) -> Tensor:
        """Update of the layer's weight, (outputs, inputs * height * width) float32."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return product * (self.alpha / self.rank)


class LoRAFile(NamedTuple):
    """A LoRA as read from its file, not yet matched with a model.

    The layers' names are flat (`down_blocks_0_attentions_1_...`), because kohya's layout has no
    dots; `match_lora` maps them to the layers of a model.
    """

    source: str
    layers: dict[tuple[str, str], LoRALayer]  # by role (`denoiser`, `text_encoder`, ...), flat name
    models: tuple[str, ...] = ()  # names that its metadata have for the model it was trained on

    def denoiser_alone(self) -> LoRAFile:
        """Return a copy without the layers of the text encoders."""
        own = {key: layer for key, layer in self.layers.items() if key[0] == DENOISER}
        return self._replace(layers=own)

    def scaled(self, factor: float) -> LoRAFile:
        """Return a copy whose updates are multiplied by a factor."""
        layers = {key: x._replace(alpha=factor * x.alpha) for key, x in self.layers.items()}
        return self._replace(layers=layers)

    def without_denoiser(self) -> LoRAFile:
        """Return a copy with the layers of the text encoders alone."""
        own = {key: layer for key, layer in self.layers.items() if key[0] != DENOISER}
        return self._replace(layers=own)


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA from a .safetensors file or a folder.

    The layouts are those of diffusers, kohya, peft (with its adapter_config.json), ComfyUI and
    OneTrainer, with diffusers' layer names or the original ones. Every layer has its own rank and
    alpha.

    Args:
        path: The file, or a folder of diffusers or peft with one in it.

    Raises:
        InputError: The file is missing, damaged, or not a plain LoRA.
    """
    folder = Path(path)
    layers: dict[tuple[str, str], LoRALayer] = {}
    models: tuple[str, ...] = ()
    for file, part in _lora_files(folder):
        tensors, metadata = read_safetensors(file)
        for key, layer in _read_layers(file, tensors, metadata, part):
            if key in layers:  # in two spellings, which name the same layer
                raise InputError(
                    f"{path} contains the layer {some_names([key[1]])} twice; remove one of them."
                )
            layers[key] = layer
        models += tuple(metadata[name] for name in STATED if metadata.get(name))
    return LoRAFile(str(path), layers, models)


def is_adapter(keys: Iterable[str]) -> bool:
    """Return whether the keys of a file are those of a LoRA or of another adapter.

    Args:
        keys: Names of its tensors.
    """
    return any(ADAPTER.search(key) for key in keys)


def is_lora_folder(folder: Path) -> bool:
    """Return whether a folder contains a LoRA of diffusers or peft under its usual name."""
    return any((folder / name).is_file() for name in FILES)


def _lora_files(path: Path) -> list[tuple[Path, str | None]]:
    """Return the files of a LoRA, each with its role if that is named by a folder."""
    if not path.is_dir():
        return [(path, None)]
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise InputError(
            f"{path} contains neither {WEIGHTS} nor {PEFT_WEIGHTS}, but "
            f"{some_names(sorted(p.name for p in path.iterdir())) or 'nothing'}: name the file of "
            "the LoRA."
        )
    if found[0].parent == path:
        return [(found[0], None)]
    return [(file, role_of(file.parent.name)) for file in found]


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a .safetensors file."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; name a .safetensors file.")
    try:
        with safe_open(file, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a safetensors file: convert the weights to that format; pickled files "
            "(.ckpt, .pt, .bin of others) are never opened."
        ) from error


def flat_name(name: str) -> str:
    """Return a module's name in kohya's layout."""
    return name.replace(".", "_")


def _read_layers(
    file: Path, everything: dict[str, Tensor], metadata: dict[str, str], part: str | None
) -> Iterator[tuple[tuple[str, str], LoRALayer]]:
    """Yield the layers of a file; a peft adapter of a text encoder is named by its folder."""
    tensors = {key: x for key, x in everything.items() if not key.startswith(BUNDLED)}
    _check_kind(file, tensors)
    check_finite(tensors, str(file), "use a copy that is not damaged")
    adapters = _adapters(file, tensors, metadata, part)
    for (owner, name), found in layer_tensors(file, tensors, part).items():
        alpha = found.pop("alpha", None)
        if alpha is not None and (alpha.numel() != 1 or alpha.dtype in NO_NUMBERS):
            raise InputError(
                f"{file} is damaged: the alpha of its layer {quoted(name)} is not a number."
            )
        down, up = _pair(file, name, found)
        default = adapter_alpha(file, adapters.get(owner, {}), name, len(down))
        strength = default if alpha is None else float(alpha)
        yield (owner, flat_name(name)), LoRALayer(down, up, strength)
    if bundled := sorted({key.split(".")[1] for key in everything if key.startswith(BUNDLED)}):
        rank_zero_warn(
            f"{file} also contains the embeddings {some_names(bundled)}, which are not read: only "
            "its LoRA is used."
        )


def _check_kind(file: Path, tensors: dict[str, Tensor]) -> None:
    """Check that tensors are a plain LoRA's."""
    for mark, kind in OTHER_KINDS.items():
        if wrong := [key for key in tensors if re.search(mark, key)]:
            raise InputError(
                f"{file} contains {kind} ({some_names(wrong, 1)}), which is not a plain LoRA: "
                "merge it into its model with the program that wrote it, and use the merged model "
                "instead."
            )
    if not any("lora" in key for key in tensors):
        raise InputError(
            f"{file} contains no LoRA, but {contents(tensors)}: name a file of LoRA weights."
        )


def _adapters(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str], part: str | None
) -> dict[str, Adapter]:
    """Return the adapter configurations of a file, by role."""
    adapters = file_adapters(file, metadata)
    beside = file.with_name(PEFT_CONFIG)
    if not any(key.startswith("base_model.") for key in tensors):
        return adapters
    if adapters:
        return adapters
    if not beside.is_file():
        raise InputError(
            f"{file} is a peft adapter, whose alpha is in {PEFT_CONFIG}: copy that file beside it."
        )
    roles = map(role_of, COMPONENTS) if part is None else (part,)
    return dict.fromkeys(roles, peft_adapter(beside))


def _pair(file: Path, name: str, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the two matrices of a layer."""
    if set(found) != {"down", "up"}:
        raise InputError(
            f"{file} contains only {' and '.join(sorted(found)) or 'the alpha'} of its layer "
            f"{some_names([name])}: use a plain LoRA that is not damaged."
        )
    down, up = (_weights(file, name, found[half]) for half in ("down", "up"))
    # the second of two convolutions has a kernel of 1 x 1
    fits = min(down.ndim, up.ndim) >= 2 and len(down) == up.shape[1] and len(down) > 0
    if not fits or up[0].numel() != len(down):
        raise InputError(
            f"{file} is damaged: the two matrices of its layer {some_names([name])} do not fit."
        )
    return down, up


def _weights(file: Path, name: str, matrix: Tensor) -> Tensor:
    """Return a matrix of a layer, whose dtype must be a floating one; of float8 in bfloat16."""
    if not matrix.is_floating_point():
        raise InputError(
            f"{file} contains {str(matrix.dtype).removeprefix('torch.')} weights of its layer "
            f"{some_names([name])}: use a LoRA in float16, bfloat16 or float32."
        )
    # exactly the same values, in a type that can be computed with
    return matrix.bfloat16() if matrix.element_size() == 1 else matrix

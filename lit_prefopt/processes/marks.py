"""Marks of prediction type and noise schedule in single files and LoRA files.

A single file has no scheduler configuration. A1111, ComfyUI and Forge recognise an SDXL model with
v prediction by the key `v_pred`, and zero terminal SNR by the key `ztsnr`; kohya's trainer and
Stability AI's model specification state them in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prefopt.errors import InputError

V_KEY, ZERO_KEY = "v_pred", "ztsnr"

V_METADATA = {
    "modelspec.prediction_type": ("v", "v_prediction"),
    "modelspec.predict_key": ("v",),  # ComfyUI's name of it
    "ss_v_parameterization": ("true",),
}
"""Fields of the metadata that state v prediction, and their values in lower case.

Their other values prove nothing: most files state epsilon without having been checked.
"""

ZERO_METADATA = {"ss_zero_terminal_snr": ("true",)}

FOREIGN_KEYS = {
    "edm_mean": "EDM with latents of their own mean and deviation, as Playground v2.5",
    "edm_std": "EDM with latents of their own mean and deviation, as Playground v2.5",
    "edm_vpred.sigma_max": "EDM with v prediction, as CosXL",
}
"""Keys of single files with a noise process other than DDPM's."""


class NoiseMarks(NamedTuple):
    """What a file states of its prediction type and noise schedule."""

    v: tuple[str, ...] = ()  # names of the marks of v prediction
    zero: tuple[str, ...] = ()  # names of the marks of zero terminal SNR

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a scheduler configuration that they stand for."""
        prediction = {"prediction_type": "v_prediction"} if self.v else {}
        return prediction | ({"rescale_betas_zero_snr": True} if self.zero else {})

    @property
    def summary(self) -> str:
        """Description for messages; empty without marks."""
        parts = [
            f"{meaning} ({', '.join(names)})"
            for meaning, names in (("v prediction", self.v), ("zero terminal SNR", self.zero))
            if names
        ]
        return " with ".join(parts)


def read_marks(file: str) -> NoiseMarks:
    """Read the marks of a .safetensors file from its header.

    Args:
        file: The file.

    Raises:
        InputError: It cannot be read, or is marked as a model with another noise process.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return find_marks(file, tensors.keys(), tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors ({error}): name a complete .safetensors file."
        ) from error


def source_marks(*sources: str | None) -> NoiseMarks:
    """Return the marks of the first of several checkpoints that has any.

    Args:
        sources: Hub names, folders or files, the denoiser's first; only single files have marks.
    """
    files = [source for source in sources if source is not None and source.endswith(".safetensors")]
    return next((marks for marks in map(read_marks, files) if any(marks)), NoiseMarks())


def find_marks(file: str, keys: Iterable[str], metadata: Mapping[str, str]) -> NoiseMarks:
    """Return the marks among the keys and the metadata of a file.

    Args:
        file: Its name, for messages.
        keys: Names of its tensors.
        metadata: Its metadata.

    Raises:
        InputError: It is marked as a model with another noise process.
    """
    own = set(keys)
    for key, process in FOREIGN_KEYS.items():
        if key in own:
            raise InputError(
                f"{file} is marked as a model of {process} (its key {key}), whose noise process is "
                "not known: name a checkpoint of discrete diffusion (DDPM)."
            )
    return NoiseMarks(
        _found(V_KEY, own, V_METADATA, metadata), _found(ZERO_KEY, own, ZERO_METADATA, metadata)
    )


def mark_tensors(v_prediction: bool, zero_terminal_snr: bool) -> dict[str, Tensor]:
    """Return the keys that mark a single file; epsilon prediction has none.

    Args:
        v_prediction: Whether the denoiser predicts v.
        zero_terminal_snr: Whether the last noise level is pure noise.
    """
    names = (V_KEY, ZERO_KEY) if zero_terminal_snr else (V_KEY,)
    return {name: torch.zeros(0) for name in names} if v_prediction else {}


def mark_metadata(v_prediction: bool, zero_terminal_snr: bool) -> dict[str, str]:
    """Return the metadata that mark a file, in the forms of the model specification and of kohya.

    Args:
        v_prediction: Whether the denoiser predicts v.
        zero_terminal_snr: Whether the last noise level is pure noise.
    """
    return {
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "ss_v_parameterization": str(v_prediction),
        "ss_zero_terminal_snr": str(zero_terminal_snr),
    }


def add_metadata(file: Path, fields: Mapping[str, str]) -> None:
    """Add fields to the metadata of a .safetensors file.

    Args:
        file: The file, which is written again.
        fields: The new fields; they replace those of the same names.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, {**metadata, **fields})


def _found(
    key: str, keys: set[str], fields: Mapping[str, tuple[str, ...]], metadata: Mapping[str, str]
) -> tuple[str, ...]:
    stated = (name for name, values in fields.items() if metadata.get(name, "").lower() in values)
    return (*([key] if key in keys else []), *stated)

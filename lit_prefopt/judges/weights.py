"""Published weights of judges: where they lie, what is in them, and which ones they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_prefopt.errors import InputError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def weights_file(weights: str | None, repository: str, name: str) -> Path:
    """Return a file of weights: a local one, or else the published one out of the hub's cache.

    Args:
        weights: A local file.
        repository: Where the published one lies on the hub.
        name: Its name there.

    Raises:
        InputError: There is no such file, or the hub does not give it.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(
                f"There is no file {weights}: name the weights, which huggingface.co/{repository} "
                f"has as {name}."
            )
        return Path(weights)
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise InputError(
            f"{name} of huggingface.co/{repository} cannot be had ({_first_line(error)}): download "
            "it where the hub can be reached, and name the file as the judge's `weights`."
        ) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of one of torch's, which is never unpickled.

    Args:
        file: The file; tensors that lie in it under `state_dict` are taken out of there.

    Raises:
        InputError: It holds no named tensors that can be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch and safetensors raise nearly anything on a broken file
        raise InputError(
            f"{file} cannot be read as weights ({_first_line(error)}): download it again."
        ) from error


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path, name: str, cure: str) -> None:
    """Load weights that must be exactly those of the model.

    Args:
        model: Where they go.
        state: The weights by the model's own names.
        file: Where they come from, for the message.
        name: What the model is, for the message.
        cure: What to do where they do not fit.

    Raises:
        InputError: One is missing, is too many or has another shape.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            difference = (
                f"{key} is {found.get(key, 'missing')} and should be {wanted.get(key, 'absent')}"
            )
            raise InputError(f"{file} does not fit {name} ({difference}): {cure}.")
    model.load_state_dict(state)


def version(source: str, name: str = "config.json") -> str | None:
    """Return which weights these are: a hash of local ones, or the hub's commit where it is known.

    Args:
        source: A file, a folder or a name on the hub.
        name: A file of that repository which has been fetched.
    """
    path = Path(source)
    if path.is_file():
        return f"sha256:{_digest(path)}"
    if path.is_dir():
        parts = [_digest(file) for file in sorted(path.iterdir()) if file.suffix in WEIGHTS]
        whole = parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
        return f"sha256:{whole}"
    cached = try_to_load_from_cache(source, name)
    return f"commit:{Path(cached).parent.name}" if isinstance(cached, str) else None


def _digest(file: Path) -> str:
    stat = file.stat()
    return _hashed(file.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache
def _hashed(file: Path, size: int, modified: int) -> str:
    """Hash a file once; size and time of change tell whether it still is the same one."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def loading_errors(source: str, name: str, cure: str) -> Iterator[None]:
    """Turn what transformers raises over files into a sentence.

    Args:
        source: Folder or hub name.
        name: What is looked for in it.
        cure: What to do where it is not there.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{source} holds no {name} that can be loaded ({_first_line(error)}): {cure}."
        ) from error

"""Published weights of judges: download, read, load and identify them."""

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
from lit_prefopt.weights.checks import check_finite
from lit_prefopt.weights.hub import check_reachable

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def weights_file(weights: str | None, repository: str, name: str) -> Path:
    """Return the path of a weights file: a local one, or the published one, downloaded if needed.

    Args:
        weights: A local file.
        repository: Repository of the published file on the hub.
        name: Its name there.

    Raises:
        InputError: The file does not exist or cannot be downloaded.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(
                f"There is no file {weights}: name the weights, which huggingface.co/{repository} "
                f"has as {name}."
            )
        return Path(weights)
    try:
        check_reachable(repository)
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # errors of the hub's client, httpx or the system
        raise InputError(
            f"{name} of huggingface.co/{repository} is not available ({_first_line(error)}): "
            "download it on a machine with access, and name the file as the judge's `weights`."
        ) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or a torch file (with weights_only).

    Args:
        file: The file; tensors may be nested under `state_dict`.

    Raises:
        InputError: It contains no named tensors that can be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch and safetensors raise many types for broken files
        raise InputError(
            f"{file} cannot be read as weights ({_first_line(error)}): download it again."
        ) from error


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path, name: str, cure: str) -> None:
    """Load weights into a model strictly.

    Args:
        model: The target.
        state: The weights by the model's own names.
        file: Their file, for the message.
        name: Description of the model, for the message.
        cure: Remedy if they do not fit, for the message.

    Raises:
        InputError: A weight is missing, unexpected, of another shape, NaN or infinite.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            difference = (
                f"{key} is {found.get(key, 'missing')} and should be {wanted.get(key, 'absent')}"
            )
            raise InputError(f"{file} does not fit {name} ({difference}): {cure}.")
    check_finite(state, str(file), "download it again")
    model.load_state_dict(state)


def version(source: str, name: str = "config.json") -> str | None:
    """Return the version of weights: a hash of a local file, or the hub's commit if it is known.

    Args:
        source: A file, a folder or a name on the hub.
        name: A downloaded file of that repository.
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
    """Hash a file, cached by its size and modification time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def loading_errors(source: str, name: str, cure: str) -> Iterator[None]:
    """Raise InputError for transformers' errors in loading files.

    Args:
        source: Folder or hub name.
        name: The component to load, for the message.
        cure: Remedy if it cannot be loaded, for the message.
    """
    try:
        check_reachable(source)
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{source} has no {name} that can be loaded ({_first_line(error)}): {cure}."
        ) from error

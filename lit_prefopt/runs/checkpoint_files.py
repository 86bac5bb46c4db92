"""Checkpoint files: written whole, checked before they are trusted."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import atomic_file

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name beside it, and renames it once it is on the disk.

    Lightning's own way goes through the system's temporary folder; where that is another file
    system, its last move is a copy that a kill cuts short. It also holds the whole file in memory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; remote paths are left to Lightning, whose uploads are whole."""
        if not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch turns the former into the latter
            cause = _os_error(error)
            if cause is None:
                raise
            raise InputError(
                f"{path} could not be written ({cause.strerror}): make room there or name another "
                "folder by `--trainer.default_root_dir`; the checkpoints before it are whole, go "
                "on from them by `--ckpt_path last`."
            ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def is_complete(path: Path) -> bool:
    """Whether a checkpoint file is complete: all of its parts are there and have their checksums.

    Reads the file once.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def newest_complete(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step in a folder, None if there is none.

    Damaged ones are told and left where they are.
    """
    for path in sorted(folder.glob("*.ckpt"), key=_age):
        if is_complete(path):
            return path
        log.warning(f"{path} is damaged or was cut short; the checkpoint before it is taken.")
    return None


def _age(path: Path) -> tuple[float, bool, float]:
    """Order checkpoints from new to old; of one step, `last.ckpt` was written last."""
    return -_step(path), path.name != LAST, -path.stat().st_mtime


def _step(path: Path) -> float:
    if not zipfile.is_zipfile(path):
        return float("inf")  # asked first, found damaged and told
    # mapped, so that no weights are read
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return float(checkpoint["global_step"])


def last_checkpoint(folder: Path, *, fitting: bool) -> str:
    """Return what `--ckpt_path last` means: the newest whole checkpoint of a run.

    A kill may come between a step's numbered checkpoint and `last.ckpt`. A run that goes on is
    given the newest as its `last.ckpt`, as it would have been, so that the numbered one is
    replaced in its time.

    Args:
        folder: Where the run's checkpoints lie.
        fitting: Whether the run goes on, or is only looked at.

    Raises:
        InputError: None of them is whole.
    """
    held = sorted(folder.glob("*.ckpt"))
    if any(path.is_dir() for path in held):
        return "last"  # sharded checkpoints are folders, which Lightning chooses by their dates
    newest = newest_complete(folder)
    if newest is None:
        raise InputError(
            f"No checkpoint in {folder} is whole ({', '.join(p.name for p in held)}): remove them "
            "and begin anew without `--ckpt_path`."
        )
    last = folder / LAST
    if not fitting or newest == last or not last.exists():
        return str(newest)
    _same_file(newest, last)
    return str(last)


def _same_file(source: Path, target: Path) -> None:
    """Let `target` be `source` in one go, without a copy where the file system can."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def check_complete(path: Path) -> None:
    """Refuse a damaged checkpoint, and name the newest whole one beside it.

    Raises:
        InputError: The file is no whole checkpoint.
    """
    if path.is_dir() or is_complete(path):
        return
    other = newest_complete(path.parent)
    cure = f"go on from {other}" if other else "begin anew without `--ckpt_path`"
    raise InputError(f"{path} is damaged or was cut short; {cure}.")

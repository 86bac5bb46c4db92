"""Checkpoint files: written atomically, and checked before loading."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import atomic_file
from lit_prefopt.weights.checkpoint import RESUME_PARTS, RUN_PARTS, Parts, fault, read_checkpoint

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside it, and renames it once it is on the disk.

    Lightning writes to the system's temporary folder; if that is on another file system, its final
    move is a copy, which a kill truncates. It also keeps the whole file in memory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; remote paths are left to Lightning, whose uploads are atomic."""
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
                f"{path} could not be written ({cause.strerror}): free disk space or choose "
                "another folder with `--trainer.default_root_dir`; earlier checkpoints are "
                "complete, resume from them with `--ckpt_path last`."
            ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def newest_complete(folder: Path, parts: Parts) -> Path | None:
    """Return the complete checkpoint of the latest step in a folder, or None.

    Others are logged and kept, such as those of other programs, which have no recipe.

    Args:
        folder: Folder of checkpoints.
        parts: Parts that it must have, with their types.
    """
    for path in sorted(folder.glob("*.ckpt"), key=_age):
        wrong = fault(path, parts, recipe=True)
        if wrong is None:
            return path
        log.warning(f"{wrong.rstrip('.')}; it is passed over.")
    return None


def _age(path: Path) -> tuple[float, bool, float]:
    """Return a sort key, newest first; within a step, `last.ckpt` was written last."""
    return -_step(path), path.name != LAST, -path.stat().st_mtime if path.exists() else 0.0


def _step(path: Path) -> float:
    try:
        return float(read_checkpoint(path, RUN_PARTS, whole=False)["global_step"])
    except InputError:
        return float("inf")  # tried first, then logged


def last_checkpoint(folder: Path, *, fitting: bool) -> str:
    """Return the checkpoint of `--ckpt_path last`: the newest complete one of a run.

    A kill may come between a step's numbered checkpoint and `last.ckpt`. When a run is resumed, the
    newest becomes its `last.ckpt`, as without the kill, so that the numbered one is replaced later
    as usual.

    Args:
        folder: Folder of the run's checkpoints.
        fitting: Whether the run is resumed, or only read.

    Raises:
        InputError: None of them is complete.
    """
    newest = newest_complete(folder, RESUME_PARTS if fitting else RUN_PARTS)
    if newest is None:
        held = sorted(path.name for path in folder.glob("*.ckpt"))
        raise InputError(
            f"No checkpoint in {folder} is complete ({', '.join(held[:5])}): remove them and start "
            "again without `--ckpt_path`."
        )
    last = folder / LAST
    if not fitting or newest == last or not last.is_file():
        return str(newest)
    _same_file(newest, last)
    return str(last)


def _same_file(source: Path, target: Path) -> None:
    """Replace `target` by `source` atomically, by a hard link if the file system supports it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def check_complete(path: Path, parts: Parts) -> None:
    """Raise InputError for a damaged checkpoint, with the newest complete one beside it.

    Args:
        path: The file.
        parts: Parts that it must have, with their types.

    Raises:
        InputError: The file is not a complete checkpoint.
    """
    wrong = fault(path, parts)
    if wrong is None:
        return
    other = newest_complete(path.parent, parts)
    cure = f"resume from {other}" if other else "start again without `--ckpt_path`"
    raise InputError(f"{wrong.rstrip('.')}; {cure}.")

"""The run's directory: its name, its recipe, and checks against overwriting another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.errors import InputError
from lit_prefopt.runs.checkpoint_files import check_complete, last_checkpoint
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.output_lock import OutputLock, check_free_space

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
ELSEWHERE = ("ckpt_path", "trainer.default_root_dir")  # locations, which are not part of the recipe
ABSENT = "(absent)"
OTHER_FOLDER = "choose another folder with `--trainer.default_root_dir FOLDER`"


def run_directory(config: Namespace) -> Path:
    """Return the run's directory: `trainer.default_root_dir`, else `runs/<name of the recipe>`."""
    if config.trainer.default_root_dir is not None:
        return Path(config.trainer.default_root_dir)
    recipes = [Path(str(path)) for path in config.config or []]
    return Path("runs") / (recipes[-1].stem if recipes else "unnamed")


def check_run_directory(root: Path, ckpt_path: str | None, *, fitting: bool) -> str | None:
    """Check that a run neither overwrites another run nor resumes from a bad checkpoint.

    A fit locks the directory (rank zero), until `release_locks` or the end of the process.

    Args:
        root: The run's directory.
        ckpt_path: `--ckpt_path`: `last`, a path, or None.
        fitting: Whether the run will write checkpoints.

    Returns:
        The checkpoint to resume from: for `last`, the newest complete one.

    Raises:
        InputError: The directory belongs to another run or is in use, or the checkpoint is missing
            or damaged.
    """
    if fitting and _is_first_rank():
        OutputLock(root, OTHER_FOLDER, inside=True).acquire()  # until the command ends
        check_free_space(root)
    held = sorted((root / CHECKPOINTS).glob("*.ckpt"))
    if ckpt_path == "last":
        if not held:
            raise InputError(
                f"{root / CHECKPOINTS} contains no checkpoint: name the run's directory with "
                "`--trainer.default_root_dir FOLDER`, or omit `--ckpt_path` to start a new run."
            )
        return last_checkpoint(root / CHECKPOINTS, fitting=fitting)
    own = ckpt_path is not None
    if ckpt_path not in (None, "best", "hpc", "registry"):
        checkpoint = Path(str(ckpt_path)).resolve()
        if not checkpoint.exists():
            raise InputError(f"{ckpt_path} does not exist; name a checkpoint, or use `last`.")
        check_complete(checkpoint)
        own = root.resolve() in checkpoint.parents
    if fitting and held and not own and _is_first_rank():
        raise InputError(
            f"{root} contains another run: resume it with `--ckpt_path last`, or {OTHER_FOLDER}."
        )
    return ckpt_path


def logger_arguments(config: Namespace, root: Path) -> dict[str, Any]:
    """Return the Trainer's additional arguments: its directory and the default logger."""
    arguments: dict[str, Any] = {"default_root_dir": str(root)}
    if config.trainer.logger in (None, True):
        arguments["logger"] = TensorBoardLogger(
            str(root), name="", version="logs", default_hp_metric=False
        )
    return arguments


def set_checkpoint_folder(trainer: Trainer, root: Path) -> None:
    """Set the run's directory for checkpoint callbacks without their own."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(root.resolve() / CHECKPOINTS)


def _is_first_rank() -> bool:
    """Return whether this is rank zero (before a Trainer exists)."""
    return not _get_rank()


class RunDirectory(SaveConfigCallback):
    """Writes the resolved recipe into the run's directory and into every checkpoint."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `recipe.yaml` (rank zero)."""
        if stage == "fit":
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            write_atomic(root / RECIPE, self.recipe)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the recipe as text in the checkpoint."""
        checkpoint["recipe"] = self.recipe

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Log the differences between the recipe and the checkpoint's."""
        if trainer.state.fn == "fit" and "recipe" in checkpoint:
            changes = differences(checkpoint["recipe"], self.recipe)
            if changes:
                lines = "\n".join(f"  {change}" for change in changes)
                rank_zero_info(f"The recipe differs from the checkpoint's and is used:\n{lines}")

    @property
    def recipe(self) -> str:
        """The resolved recipe as YAML."""
        return self.parser.dump(self.config, skip_unset=False)


def differences(old: str, new: str) -> list[str]:
    """Return the differences of two resolved recipes, one line `key: old → new` each.

    Args:
        old: A recipe as YAML.
        new: Another.
    """
    before, after = (_leaves(yaml.safe_load(text)) for text in (old, new))
    keys = [key for key in {**before, **after} if not key.startswith(ELSEWHERE)]
    pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys]
    return [f"{key}: {a} → {b}" for key, a, b in pairs if a != b]


def _leaves(node: Any, key: str = "") -> dict[str, str]:
    """Return every value of a nested recipe by its dotted key."""
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        parts = [_leaves(value, f"{key}.{name}" if key else str(name)) for name, value in items]
        return {name: value for part in parts for name, value in part.items()}
    return {key: yaml.safe_dump(node, default_flow_style=True).removesuffix("...\n").strip()}

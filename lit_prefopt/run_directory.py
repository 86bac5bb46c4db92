"""One directory per run: its name, what lies in it, and the refusal to write into another's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_prefopt.errors import InputError
from lit_prefopt.whole_files import write_whole

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"


def run_directory(config: Namespace) -> Path:
    """Return the run's directory: `trainer.default_root_dir`, else `runs/<name of the recipe>`."""
    if config.trainer.default_root_dir is not None:
        return Path(config.trainer.default_root_dir)
    recipes = [Path(str(path)) for path in config.config or []]
    return Path("runs") / (recipes[-1].stem if recipes else "unnamed")


def check_run_directory(root: Path, ckpt_path: str | None, *, fitting: bool) -> None:
    """Refuse to write into another run's directory, and to go on from nothing.

    Args:
        root: The run's directory.
        ckpt_path: What the command line said: `last`, a path, or nothing.
        fitting: Whether the run is going to write checkpoints.

    Raises:
        InputError: One of the two.
    """
    if not _first_rank():
        return
    held = sorted((root / CHECKPOINTS).glob("*.ckpt"))
    if ckpt_path == "last" and not held:
        raise InputError(
            f"{root / CHECKPOINTS} holds no checkpoint to go on from: name the run's directory by "
            "`--trainer.default_root_dir FOLDER`, or leave `--ckpt_path` away to begin."
        )
    own = ckpt_path is not None
    if ckpt_path not in (None, "last", "best", "hpc", "registry"):
        checkpoint = Path(str(ckpt_path)).resolve()
        if not checkpoint.exists():
            raise InputError(f"{ckpt_path} does not exist; name a checkpoint, or say `last`.")
        own = root.resolve() in checkpoint.parents
    if fitting and held and not own:
        raise InputError(
            f"{root} holds another run: go on with it by `--ckpt_path last`, or give this one a "
            "folder of its own by `--trainer.default_root_dir FOLDER`."
        )


def logger_arguments(config: Namespace, root: Path) -> dict[str, Any]:
    """Return what the Trainer is given beside the recipe: its directory and the default logger."""
    arguments: dict[str, Any] = {"default_root_dir": str(root)}
    if config.trainer.logger in (None, True):
        arguments["logger"] = TensorBoardLogger(
            str(root), name="", version="logs", default_hp_metric=False
        )
    return arguments


def lead_checkpoints(trainer: Trainer, root: Path) -> None:
    """Let checkpoints without a directory of their own go into the run's."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(root.resolve() / CHECKPOINTS)


def _first_rank() -> bool:
    """Whether this process was not started by another rank (it runs before there is a Trainer)."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


class RunDirectory(SaveConfigCallback):
    """Writes the resolved recipe into the run's directory and into every checkpoint."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `recipe.yaml` (rank zero)."""
        if stage == "fit":
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            write_whole(root / RECIPE, self.recipe)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the recipe beside the weights, as text."""
        checkpoint["recipe"] = self.recipe

    @property
    def recipe(self) -> str:
        """The resolved recipe as YAML."""
        return self.parser.dump(self.config, skip_none=False)

"""One directory per run: its name, what lies in it, and the refusal to write into another's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_prefopt.errors import InputError

RECIPE = "recipe.yaml"


def prepare_run_directory(config: Namespace, *, fitting: bool) -> None:
    """Name the run's directory, refuse another run's, and lead logger and checkpoints into it.

    The directory is `trainer.default_root_dir`, by default `runs/<name of the recipe>`.

    Args:
        config: The parsed recipe; changed in place.
        fitting: Whether the run is going to write (`fit`), so that it must not meet another's.

    Raises:
        InputError: The directory holds another run, and the recipe does not resume it.
    """
    trainer = config.trainer
    if trainer.default_root_dir is None:
        recipes = [Path(str(path)) for path in config.config or []]
        trainer.default_root_dir = str(Path("runs") / (recipes[-1].stem if recipes else "unnamed"))
    root = Path(trainer.default_root_dir)
    resuming = config.get("ckpt_path") is not None
    if fitting and not resuming and _first_rank() and (root / RECIPE).exists():
        raise InputError(
            f"{root} holds another run: go on with it by `--ckpt_path last`, or give this one a "
            "folder of its own by `--trainer.default_root_dir FOLDER`."
        )
    if trainer.logger is None or trainer.logger is True:
        trainer.logger = _tensorboard(root)
    for callback in trainer.callbacks or []:
        if callback.class_path.endswith("ModelCheckpoint") and callback.init_args.dirpath is None:
            callback.init_args.dirpath = str(root / "checkpoints")


def _first_rank() -> bool:
    """Whether this process was not started by another rank (it runs before there is a Trainer)."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _tensorboard(root: Path) -> Namespace:
    return Namespace(
        class_path="lightning.pytorch.loggers.TensorBoardLogger",
        init_args=Namespace(save_dir=str(root), name="", version="logs", default_hp_metric=False),
    )


class RunDirectory(SaveConfigCallback):
    """Writes the resolved recipe into the run's directory and into every checkpoint."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `recipe.yaml` (rank zero)."""
        if stage == "fit":
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            (root / RECIPE).write_text(self.recipe)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the recipe beside the weights, as text."""
        checkpoint["recipe"] = self.recipe

    @property
    def recipe(self) -> str:
        """The resolved recipe as YAML."""
        return self.parser.dump(self.config, skip_none=False)

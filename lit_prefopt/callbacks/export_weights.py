"""Export the trained weights in diffusers' layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.backbones import trained
from lit_prefopt.errors import InputError
from lit_prefopt.learner import CURES, Learner
from lit_prefopt.runs.directory import RECIPE
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.utils.finite import first_not_finite


class ExportWeights(Callback):
    """Exports the weights at the end of `fit`, with the recipe.

    A LoRA becomes a file for diffusers' `load_lora_weights`, a full fine-tune a folder for
    `from_pretrained`, a step-aware judge a file for `StepAware`.

    Args:
        folder: Name of the folder inside the run's directory.
    """

    def __init__(self, folder: str = "weights") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights (rank zero).

        Raises:
            InputError: A trained weight is not finite.
        """
        if not trainer.is_global_zero or not isinstance(pl_module, Learner):
            return
        if name := first_not_finite(trained(pl_module).items()):
            raise InputError(
                f"The weights were not exported, because {name} is not finite; {CURES}."
            )
        root = Path(trainer.default_root_dir)
        with atomic_output(root / self.folder, replace=True) as folder:
            folder.mkdir()
            name = pl_module.save(folder).name
            if (root / RECIPE).is_file():
                shutil.copyfile(root / RECIPE, folder / RECIPE)
        rank_zero_info(f"Exported weights ({pl_module.layout}): {root / self.folder / name}")

"""What everything has in common that `predict` runs: groups worked on whole or not at all."""

from __future__ import annotations

import signal
import threading
import warnings
from abc import abstractmethod
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.backbones import Backbone, check_backbone
from lit_prefopt.datamodules.generation import GenerationDataModule
from lit_prefopt.errors import InputError
from lit_prefopt.generate.output_formats import OutputFormat, ShardFormat
from lit_prefopt.generate.partial_outputs import PartialOutputs


class Producer(LightningModule):
    """Makes a folder out of groups; `lit-prefopt predict` runs it, on one device or many.

    What is made of a group is kept, whole, as a folder of its own in OUTPUT.parts, so a run that
    was stopped makes only what is missing, in the same batches as before, and ends with the same
    bytes. At the end all parts are joined, in their order.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        output: Folder to be made.
    """

    WANTS: ClassVar[type[GenerationDataModule]] = GenerationDataModule  # type: ignore[type-abstract]
    """What data module deals out its groups."""

    REFUSES: ClassVar[tuple[type[GenerationDataModule], ...]] = ()
    """Which of them deal out something else."""

    WANTED: ClassVar[str] = "PromptGroups` or `--data PairGroups"
    """What to give instead, for messages."""

    VERB: ClassVar[str] = "generate"
    """What is done to a group, for messages."""

    def __init__(self, backbone: Backbone, output: str) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.output = Path(output)
        self.left_out: Counter[str] = Counter()  # of the group that is being made

    @abstractmethod
    def make(self, group: Any) -> list[Any]:
        """Return what is made of a group, in its order.

        What is left out on the way is counted by name in `left_out`.

        Args:
            group: What the data module deals out.
        """

    def make_empty(self, group: Any) -> list[Any]:
        """Return what is made of a group of which nothing can be read."""
        return []

    def settings(self) -> dict[str, Any]:
        """Return what decides, beside model and data, what is made."""
        return {}

    def model_settings(self) -> dict[str, Any]:
        """Return what decides of the model what is made."""
        return {}

    def notes(self) -> dict[str, Any]:
        """Return what else is told of how it is made."""
        return {}

    @property
    def form(self) -> OutputFormat:
        """What kind of folder is made."""
        return ShardFormat()

    def complete(self, folder: Path) -> None:
        """Write what else belongs into the output (rank zero, at the end).

        Args:
            folder: The output under its temporary name.
        """

    def summary(self) -> str:
        """Return what is said of the output at the end, beside what was counted."""
        return ""

    def groups(self) -> GenerationDataModule:
        """Return the data module; refuse one that deals out something else."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, self.WANTS) or isinstance(data, self.REFUSES):
            raise InputError(
                f"{type(self).__name__} wants other data: give `--data {self.WANTED}`, with its "
                "arguments."
            )
        return data

    def setup(self, stage: str | None = None) -> None:
        """Look at what is there already, before anything is made."""
        self.parts = self.partial_outputs(self.groups())
        self.parts.check()

    def partial_outputs(self, data: Any) -> PartialOutputs:
        """Return the groups that are made already.

        Args:
            data: The data module.
        """
        settings = {
            "generator": type(self).__name__,
            **data.settings(),
            **self.model_settings(),
            **self.settings(),
        }
        return PartialOutputs(self.output, settings, data.groups, self.form, self.notes())

    def on_predict_start(self) -> None:
        """Say what is left to do; all ranks have looked before one of them writes."""
        # what is made lies in files; there is nothing to return
        warnings.filterwarnings("ignore", "predict returned None")
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler is for trainings; here all that is done is on the disk
            signal.signal(signal.SIGTERM, _leave)
        self.trainer.strategy.barrier()
        self.parts.write_settings()
        missing = self.parts.missing()
        if self.parts.complete:
            rank_zero_info(f"{self.output} is complete: nothing is left to {self.VERB}.")
        elif missing < self.parts.count:
            rank_zero_info(f"{missing} of {self.parts.count} groups are left to {self.VERB}.")

    def predict_step(self, group: Any, batch_idx: int) -> None:
        """Make a group, unless it has been made."""
        if self.parts.complete or self.parts.has(group.number):
            return
        self.left_out.clear()
        made = self.make(group) if group.indices else self.make_empty(group)
        self.parts.write(group.number, made, self.left_out)

    def on_predict_end(self) -> None:
        """Join what was made (rank zero), and say what was left out."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero and not self.parts.complete:
            self._join()
        self.trainer.strategy.barrier()

    def _join(self) -> None:
        missing = self.parts.missing()
        if missing:  # the Trainer was given a limit
            rank_zero_info(f"{missing} groups are left: the same command goes on with them.")
            return
        self.log_counts(self.parts.join(self.complete))

    def log_counts(self, counts: Counter[str]) -> None:
        """Say what was made (rank zero, at the end).

        Args:
            counts: What was counted, by name.
        """
        counted = "".join(f", {count} {name}" for name, count in sorted(counts.items()))
        rank_zero_info(f"Pairs: {self.output}{counted}{self.summary()}")


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)

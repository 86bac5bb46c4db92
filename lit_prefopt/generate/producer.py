"""Base class of everything that `predict` runs: resumable processing in atomic groups."""

from __future__ import annotations

import signal
import threading
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
from lit_prefopt.utils.output_lock import check_free_space
from lit_prefopt.utils.quiet import ignore_warnings


class Producer(LightningModule):
    """Writes an output folder group by group; run by `lit-prefopt predict` on one device or many.

    Each group's output is written atomically to a folder of its own in OUTPUT.parts: a resumed
    run processes only the missing groups, in the same batches, and the output is identical byte
    for byte. At the end all parts are joined in order.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        output: Output folder.
    """

    WANTS: ClassVar[type[GenerationDataModule]] = GenerationDataModule  # type: ignore[type-abstract]
    """The data module that yields its groups."""

    REFUSES: ClassVar[tuple[type[GenerationDataModule], ...]] = ()
    """Subclasses of it that yield something else."""

    WANTED: ClassVar[str] = "PromptGroups` or `--data PairGroups"
    """The data modules to use, for messages."""

    VERB: ClassVar[str] = "generate"
    """The verb for processing a group, for messages."""

    SIMILAR: ClassVar[bool] = True
    """Whether all groups take about the same space, so that the first shows that of all."""

    def __init__(self, backbone: Backbone, output: str) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.output = Path(output)
        self.left_out: Counter[str] = Counter()  # of the current group
        self._estimated = False

    @abstractmethod
    def make(self, group: Any) -> list[Any]:
        """Process a group and return its items, in order.

        Skipped items are counted by reason in `left_out`.

        Args:
            group: A group of the data module.
        """

    def make_empty(self, group: Any) -> list[Any]:
        """Return the items of a group of which nothing can be read."""
        return []

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, besides model and data."""
        return {}

    def model_settings(self) -> dict[str, Any]:
        """Return the model's settings that determine the output."""
        return {}

    def least_bytes(self) -> int:
        """Return a low estimate of the output's size, where it is known before the first group."""
        return 0

    def notes(self) -> dict[str, Any]:
        """Return notes that may differ in a resumed run."""
        return {}

    @property
    def form(self) -> OutputFormat:
        """Format of the output folder."""
        return ShardFormat()

    def complete(self, folder: Path) -> None:
        """Write the remaining files of the output (rank zero, at the end).

        Args:
            folder: The output folder with its temporary name.
        """

    def summary(self) -> str:
        """Return the part of the final message after the counts."""
        return ""

    def groups(self) -> GenerationDataModule:
        """Return the data module after a check of its type."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, self.WANTS) or isinstance(data, self.REFUSES):
            raise InputError(
                f"{type(self).__name__} needs another data module: use `--data {self.WANTED}`, "
                "with its arguments."
            )
        return data

    def setup(self, stage: str | None = None) -> None:
        """Check an existing output before processing."""
        self.parts = self.partial_outputs(self.groups())
        if self.trainer.is_global_zero:
            self.parts.lock.acquire()
            check_free_space(self.output, self.least_bytes(), "its content needs")
        self.parts.check()

    def partial_outputs(self, data: Any) -> PartialOutputs:
        """Return the finished groups.

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
        """Log what is left to do; all ranks have checked the output before one of them writes."""
        ignore_warnings()
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler is for training; here all finished groups are on the disk
            signal.signal(signal.SIGTERM, _leave)
        self.trainer.strategy.barrier()
        self.parts.write_settings()
        missing = self.parts.missing()
        if self.parts.complete:
            rank_zero_info(f"{self.output} is complete: nothing is left to {self.VERB}.")
        elif missing < self.parts.count:
            rank_zero_info(f"{missing} of {self.parts.count} groups are left to {self.VERB}.")

    def predict_step(self, group: Any, batch_idx: int) -> None:
        """Process a group, unless it is finished."""
        if self.parts.complete or self.parts.has(group.number):
            return
        self.left_out.clear()
        made = self.make(group) if group.indices else self.make_empty(group)
        self.parts.write(group.number, made, self.left_out)
        if self.SIMILAR and not self._estimated and self.trainer.is_global_zero:
            self._estimated = True
            self.parts.check_free_space(group.number)

    def on_predict_end(self) -> None:
        """Join the parts (rank zero), and log the counts."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero and not self.parts.complete:
            self._join()
        self.trainer.strategy.barrier()

    def teardown(self, stage: str) -> None:
        """Release the output's lock."""
        self.parts.lock.release()

    def _join(self) -> None:
        missing = self.parts.missing()
        if missing:  # the Trainer has a limit
            rank_zero_info(f"{missing} groups are left: resume with the same command.")
            return
        self.log_counts(self.parts.join(self.complete))

    def log_counts(self, counts: Counter[str]) -> None:
        """Log the counts (rank zero, at the end).

        Args:
            counts: Counts by name.
        """
        counted = "".join(f", {count} {name}" for name, count in sorted(counts.items()))
        rank_zero_info(f"Pairs: {self.output}{counted}{self.summary()}")


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)

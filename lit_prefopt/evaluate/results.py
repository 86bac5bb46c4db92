"""Write an evaluation's results: in parts per group of prompts, joined at the end."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.images import to_pil
from lit_prefopt.errors import check_number
from lit_prefopt.evaluate.comparison import (
    RULE,
    EvaluationPlan,
    ImageSampler,
    SampleResult,
    compare,
)
from lit_prefopt.evaluate.console import comparison_sheet, picture_name, picture_number, table
from lit_prefopt.evaluate.report.page import PAGE, write_page
from lit_prefopt.evaluate.rows import SIDES, read_rows
from lit_prefopt.evaluate.scoring import Scorers
from lit_prefopt.evaluate.summary import summarise
from lit_prefopt.generate.partial_outputs import PartialOutputs
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.atomic_files import atomic_output, write_atomic

ROWS, SUMMARY, IMAGES, SECONDS = "per_prompt.jsonl", "evaluation.json", "images", "seconds.txt"
SHEET = "before-after.png"
MOST_IN_SHEET = 16
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "lit-prefopt")

Pictures = int | Literal["all"]


class ResultGroup(NamedTuple):
    """Results of a group of prompts, with the time that they took."""

    results: list[SampleResult]
    seconds: float


class ResultsWriter:
    """Writes a folder with rows and images, renamed when the block ends without an error.

    Args:
        output: Output folder; an existing one is replaced.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.samples = output, 0
        self._stack = ExitStack()

    def __enter__(self) -> ResultsWriter:
        """Create the folder with a temporary name."""
        self.folder = self._stack.enter_context(atomic_output(self.output, replace=True))
        (self.folder / IMAGES).mkdir(parents=True)
        (self.folder / ROWS).touch()
        return self

    def append(self, lines: str) -> None:
        """Append lines to the rows."""
        with (self.folder / ROWS).open("a", encoding="utf-8") as stream:
            stream.write(lines)
        self.samples += lines.count("\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rename the folder, or remove it after an error."""
        self._stack.__exit__(kind, error, trace)


class ResultsFormat:
    """Folders with `per_prompt.jsonl` and `images/`.

    Args:
        pictures: Number of prompts, from the first one on, whose images are saved; None for all.
    """

    def __init__(self, pictures: int | None = None) -> None:
        self.pictures, self.seconds = pictures, 0.0

    def open(self, folder: Path) -> ResultsWriter:
        """Return a writer of a folder."""
        return ResultsWriter(folder)

    def add(self, writer: ResultsWriter, made: Iterable[ResultGroup]) -> None:
        """Write the results of groups."""
        for group in made:
            for row, *images in group.results:
                number = picture_number(row.prompt, row.image)
                for side, image in zip(SIDES, images, strict=True):
                    if self.pictures is None or row.prompt < self.pictures:
                        name = f"{IMAGES}/{picture_name(number, side)}"
                        to_pil(image).save(writer.folder / name)
                        getattr(row, side).picture = name
                writer.append(row.line())
            write_atomic(writer.folder / SECONDS, str(group.seconds))

    def copy(self, writer: ResultsWriter, part: Path) -> None:
        """Copy the content of a part byte by byte, after a check of its rows."""
        read_rows(part / ROWS)
        writer.append((part / ROWS).read_text(encoding="utf-8"))
        for image in (part / IMAGES).iterdir():
            shutil.copyfile(image, writer.folder / IMAGES / image.name)
        self.seconds += float((part / SECONDS).read_text())


class PartialEvaluation(PartialOutputs):
    """The evaluated groups, in a folder beside the output."""

    SETTINGS_FILE: ClassVar[str] = "settings.json"
    WORK: ClassVar[str] = "evaluation"
    MAKER: ClassVar[str] = "an evaluation"


class PartialRunEvaluation(PartialEvaluation):
    """The parts of a run's own evaluation, which replaces an earlier output."""

    ELSEWHERE: ClassVar[str] = "remove it to start again"

    @property
    def complete(self) -> bool:
        """Return False: an existing output is always replaced."""
        return False

    def check(self) -> None:
        """Raise InputError if the parts belong to another evaluation."""
        self._check(self.folder)

    def forget(self) -> None:
        """Remove the parts of another evaluation, of an earlier state of the model."""
        begun = self.folder / self.SETTINGS_FILE
        if not begun.exists() or self.differences(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)


class Evaluator:
    """Evaluates two models and writes the results.

    Args:
        models: Settings that identify the models: `reference` and `policy`, each with a `name`.
        backbones: Both models (or one backbone with both), the policy's first.
        plan: Prompts and seeds.
        scorers: Score the images.
        how: Sampler settings.
        pictures: Number of prompts whose images are saved.
        trainer: Gives precision and device.
    """

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Any]],
        backbones: Iterable[Backbone],
        plan: EvaluationPlan,
        scorers: Scorers,
        how: Sampling,
        pictures: Pictures,
        trainer: Trainer,
    ) -> None:
        self.plan, self.scorers, self.how = plan, scorers, how
        self.names = {side: models[side]["name"] for side in SIDES}
        self.form = ResultsFormat(check_pictures(pictures))
        policy, *others = backbones
        _, height, width = policy.sampling_shape(how)
        unit = policy.pixels_per_latent
        self.settings = {
            **{side: dict(models[side]) for side in SIDES},
            "sampler": {
                "class": type(policy.process.sampler(how, policy.sampling_shape(how))).__name__,
                **policy.process.settings(),
            },
            "sampling": asdict(how),
            "resolution": [height * unit, width * unit],
            "precision": str(trainer.precision),
            **plan.settings(),
            "prompts_cut": _cut([policy, *others], plan),
            **scorers.settings(),
            "pictures": pictures,
        }
        self.notes = {
            "seeds": RULE,
            "device": _device(trainer.strategy.root_device),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def evaluate_group(
        self, number: int, reference: ImageSampler, policy: ImageSampler
    ) -> ResultGroup:
        """Evaluate one group.

        Args:
            number: Of the group.
            reference: Samples the one model.
            policy: Samples the other.
        """
        begun, requests = time.monotonic(), self.plan.group(number)
        found = compare(reference, policy, self.scorers, requests, self.how.batch_size)
        return ResultGroup(found, time.monotonic() - begun)

    def complete(self, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the summary of all rows.

        Args:
            folder: Folder with the rows.
            extra: Further entries of `evaluation.json`.
        """
        rows = read_rows(folder / ROWS)
        summary: dict[str, Any] = {**summarise(rows), "models": self.names, **(extra or {})}
        summary["seconds_evaluation"] = round(self.form.seconds, 1)
        summary["pinned"] = self.settings | self.notes
        shown = [row for row in rows if row.image == 0 and row.policy.picture][:MOST_IN_SHEET]
        if shown:
            comparison_sheet(shown, folder).save(folder / SHEET)
        write_atomic(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        write_page(folder)

    def print_table(self, folder: Path) -> None:
        """Print the table and the paths of the results."""
        Console(markup=False).print(table(json.loads((folder / SUMMARY).read_text())))
        sheet = f", {SHEET}" if (folder / SHEET).exists() else ""
        print(f"Results: {folder}/{PAGE}, {SUMMARY}, {ROWS}{sheet}")


def check_pictures(pictures: Pictures) -> int | None:
    """Return the number of prompts whose images are saved, None for all."""
    if pictures == "all":
        return None
    check_number("pictures", pictures, 0)
    return pictures


def _cut(backbones: Iterable[Backbone], plan: EvaluationPlan) -> int:
    """Count the prompts that exceed a text encoder's context, and warn about them."""
    texts, known = [entry.text for entry in plan.entries], list(backbones)
    cut = sum(not all(backbone.fits_context(text) for backbone in known) for text in texts)
    if cut:
        rank_zero_warn(
            f"{cut} of {len(texts)} prompts are longer than a text encoder's context: the models "
            "get them truncated, while a judge may read them in full."
        )
    return cut


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

"""What an evaluation leaves on the disk: first in parts, a group of prompts each, then whole."""

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
    """The answers to a group of prompts, and what they took."""

    results: list[SampleResult]
    seconds: float


class ResultsWriter:
    """Writes a folder with rows and images, which gets its name when the block ends well.

    Args:
        output: The folder to be made; one that is there gives way.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.samples = output, 0
        self._stack = ExitStack()

    def __enter__(self) -> ResultsWriter:
        """Make the folder under a temporary name."""
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
        """Give the folder its name, or remove it after an error."""
        self._stack.__exit__(kind, error, trace)


class ResultsFormat:
    """Folders with `per_prompt.jsonl` and `images/`.

    Args:
        pictures: Of how many prompts, from the first one on, images are written; None: of all.
    """

    def __init__(self, pictures: int | None = None) -> None:
        self.pictures, self.seconds = pictures, 0.0

    def open(self, folder: Path) -> ResultsWriter:
        """Return what writes a folder."""
        return ResultsWriter(folder)

    def add(self, writer: ResultsWriter, made: Iterable[ResultGroup]) -> None:
        """Write the answers to groups."""
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
        """Write what a part holds, byte by byte."""
        writer.append((part / ROWS).read_text(encoding="utf-8"))
        for image in (part / IMAGES).iterdir():
            shutil.copyfile(image, writer.folder / IMAGES / image.name)
        self.seconds += float((part / SECONDS).read_text())


class PartialEvaluation(PartialOutputs):
    """The groups that are evaluated already, in a folder beside the output."""

    SETTINGS_FILE: ClassVar[str] = "settings.json"
    WORK: ClassVar[str] = "evaluation"
    MAKER: ClassVar[str] = "an evaluation"


class PartialRunEvaluation(PartialEvaluation):
    """Such parts of an evaluation whose output gives way to a new one: that of a run's folder."""

    ELSEWHERE: ClassVar[str] = "remove it to begin anew"

    @property
    def complete(self) -> bool:
        """Whether nothing is to be done; what is there is made anew."""
        return False

    def check(self) -> None:
        """Refuse to go on with what another evaluation has begun."""
        self._check(self.folder)

    def forget(self) -> None:
        """Remove what another evaluation has begun: the model has learned more since."""
        begun = self.folder / self.SETTINGS_FILE
        if not begun.exists() or self.differences(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)


class Evaluator:
    """Puts questions to two models and writes the evidence.

    Args:
        models: What tells each model from any other: `reference` and `policy`, each with a `name`.
        backbones: Both models (or one that holds both), the policy's first.
        plan: What both are asked.
        scorers: What looks at the images.
        how: How images are sampled.
        pictures: Of how many prompts images are written.
        trainer: Knows precision and device.
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
                "class": type(policy.process.sampler(how)).__name__,
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
        """Return the answers to one group.

        Args:
            number: Of the group.
            reference: Samples the one model.
            policy: Samples the other.
        """
        begun, requests = time.monotonic(), self.plan.group(number)
        found = compare(reference, policy, self.scorers, requests, self.how.batch_size)
        return ResultGroup(found, time.monotonic() - begun)

    def complete(self, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write what the rows say together.

        Args:
            folder: Holds the rows.
            extra: What else goes into `evaluation.json`.
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
        """Print the table, and where the evidence lies."""
        Console().print(table(json.loads((folder / SUMMARY).read_text())))
        sheet = f", {SHEET}" if (folder / SHEET).exists() else ""
        print(f"Evidence: {folder}/{PAGE}, {SUMMARY}, {ROWS}{sheet}")


def check_pictures(pictures: Pictures) -> int | None:
    """Return of how many prompts images are written, None for all of them."""
    if pictures == "all":
        return None
    check_number("pictures", pictures, 0)
    return pictures


def _cut(backbones: Iterable[Backbone], plan: EvaluationPlan) -> int:
    """Return how many prompts are longer than a model reads, and warn of them."""
    texts, known = [entry.text for entry in plan.entries], list(backbones)
    cut = sum(not all(backbone.fits_context(text) for backbone in known) for text in texts)
    if cut:
        rank_zero_warn(
            f"{cut} of {len(texts)} prompts are longer than the text encoder reads: the models do "
            "not see their ends, and a judge may."
        )
    return cut


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

"""What a generation has made so far: a folder for each group, joined at the end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lit_prefopt.data.latents.manifest import NOTES
from lit_prefopt.data.shards.format import GENERATION_FILE
from lit_prefopt.errors import InputError
from lit_prefopt.generate.output_formats import OutputFormat
from lit_prefopt.utils.atomic_files import write_atomic

COUNTS = "counts.json"


class PartialOutputs:
    """The groups that are made already, in a folder beside the output.

    Both folders say what decides their content, and neither takes anything from another generation.
    Until the parts are removed at the end, what was made lies on the disk twice.

    Args:
        output: Folder to be made; the parts lie in `<output>.parts`.
        settings: What decides what is made.
        count: Number of groups.
        form: What kind of folder it is.
        notes: What else is told of how it is made; it may differ where a run goes on.
    """

    SETTINGS_FILE: ClassVar[str] = GENERATION_FILE
    """Name of the file that says what decides a folder's content."""

    WORK: ClassVar[str] = "generation"
    MAKER: ClassVar[str] = "a generator"
    ELSEWHERE: ClassVar[str] = "name another folder by `--model.output FOLDER`"
    """What is made, by whom, and how it is sent elsewhere, for messages."""

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        count: int,
        form: OutputFormat,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.output, self.count, self.form = output, count, form
        self.notes = dict(notes or {})
        self.folder = output.with_name(f"{output.name}.parts")
        self.settings = json.loads(json.dumps(settings))  # as they are read back

    @property
    def complete(self) -> bool:
        """Whether the output is there."""
        return (self.output / self.SETTINGS_FILE).exists()

    def has(self, number: int) -> bool:
        """Whether a group is made."""
        return self._part(number).exists()

    def missing(self) -> int:
        """Return how many groups are left to make."""
        return sum(not self.has(number) for number in range(self.count))

    def check(self) -> None:
        """Refuse to go on with what another generation has begun or made."""
        for folder in (self.output, self.folder):
            self._check(folder)

    def _check(self, folder: Path) -> None:
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / self.SETTINGS_FILE).exists():
            raise InputError(
                f"{folder} exists and was not made by {self.MAKER}; remove it, or {self.ELSEWHERE}."
            )
        names = self.differences(folder)
        if names:
            raise InputError(
                f"{folder} belongs to another {self.WORK}, which differs in {', '.join(names)}: "
                f"give the same recipe and model to go on with it, or {self.ELSEWHERE}."
            )

    def differences(self, folder: Path) -> list[str]:
        """Return in which settings a folder's content differs from what is to be made."""
        made = json.loads((folder / self.SETTINGS_FILE).read_text())
        made.pop(NOTES, None)
        return sorted(k for k in made | self.settings if made.get(k) != self.settings.get(k))

    def write_settings(self) -> None:
        """Note what decides what is made, before the first part; of a whole output, tidy up."""
        if self.complete:
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have left it
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / self.SETTINGS_FILE, self._dump_settings())

    def write(self, number: int, made: Iterable[Any], left_out: Mapping[str, int]) -> None:
        """Keep a group, whole or not at all.

        Args:
            number: Of the group.
            made: What was made for it, as the form takes it.
            left_out: How many were left out, by reason.
        """
        with self.form.open(self._part(number)) as writer:
            self.form.add(writer, made)
            write_atomic(writer.folder / COUNTS, json.dumps({**left_out, "pairs": writer.samples}))

    def join(self, complete: Callable[[Path], object]) -> Counter[str]:
        """Make the output of all parts and remove them; return what was counted, by name.

        Args:
            complete: Writes what else belongs into the output's folder.
        """
        counts: Counter[str] = Counter()
        with self.form.open(self.output) as writer:
            for number in range(self.count):
                part = self._part(number)
                counts.update(json.loads((part / COUNTS).read_text()))
                self.form.copy(writer, part)
            if not writer.samples:
                raise InputError(_nothing(counts, self.folder))
            complete(writer.folder)
            write_atomic(writer.folder / self.SETTINGS_FILE, self._dump_settings())
        shutil.rmtree(self.folder)
        return counts

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _dump_settings(self) -> str:
        content = {**self.settings, NOTES: self.notes} if self.notes else self.settings
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _nothing(counts: Mapping[str, int], folder: Path) -> str:
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
    return (
        f"Not one pair was made ({reasons or 'there was nothing to choose from'}): loosen what "
        f"leaves pairs out, remove {folder} and begin again."
    )

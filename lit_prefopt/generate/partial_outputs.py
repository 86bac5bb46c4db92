"""Partial outputs of a generation, for resume: one folder per group, joined at the end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar

from safetensors import SafetensorError

from lit_prefopt.data.latents.manifest import NOTES
from lit_prefopt.data.shards.format import GENERATION_FILE
from lit_prefopt.errors import InputError
from lit_prefopt.generate.output_formats import OutputFormat
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.output_lock import OutputLock, check_free_space

COUNTS = "counts.json"


class PartialOutputs:
    """Finished groups of a generation, in a folder beside the output.

    Both folders store the settings that determine their content, which must match on resume.
    Until the parts are removed at the end, the output is on the disk twice.

    Args:
        output: Output folder; the parts are in `<output>.parts`.
        settings: Settings that determine the output.
        count: Number of groups.
        form: Format of the folders.
        notes: Further information; may differ in a resumed run.
    """

    SETTINGS_FILE: ClassVar[str] = GENERATION_FILE
    """Name of the file with the settings of a folder's content."""

    WORK: ClassVar[str] = "generation"
    MAKER: ClassVar[str] = "a generator"
    ELSEWHERE: ClassVar[str] = "choose another folder with `--model.output FOLDER`"
    """Product, producer and cure, for messages."""

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
        self.lock = OutputLock(output, self.ELSEWHERE)  # of rank zero
        self.settings = json.loads(json.dumps(settings))  # as they are read back

    @property
    def complete(self) -> bool:
        """Whether the output exists."""
        return (self.output / self.SETTINGS_FILE).exists()

    def has(self, number: int) -> bool:
        """Return whether a group is finished."""
        return self._part(number).exists()

    def missing(self) -> int:
        """Return the number of unfinished groups."""
        return sum(not self.has(number) for number in range(self.count))

    def check(self) -> None:
        """Raise InputError if the folders belong to a generation with other settings."""
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
                f"resume it with the same recipe and model, or {self.ELSEWHERE}."
            )

    def differences(self, folder: Path) -> list[str]:
        """Return the settings in which a folder's content differs from this generation's."""
        made = self._read_json(folder / self.SETTINGS_FILE)
        made.pop(NOTES, None)
        return sorted(k for k in made | self.settings if made.get(k) != self.settings.get(k))

    def write_settings(self) -> None:
        """Write the settings before the first part; remove the parts of a complete output."""
        if self.complete:
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have left it
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / self.SETTINGS_FILE, self._dump_settings())

    def write(self, number: int, made: Iterable[Any], left_out: Mapping[str, int]) -> None:
        """Write a group atomically.

        Args:
            number: Of the group.
            made: Its items, as the format takes them.
            left_out: Number of skipped items by reason.
        """
        with self.form.open(self._part(number)) as writer:
            self.form.add(writer, made)
            write_atomic(writer.folder / COUNTS, json.dumps({**left_out, "pairs": writer.samples}))

    def check_free_space(self, number: int) -> None:
        """Raise InputError if the disk has clearly too little space for the unfinished groups.

        Args:
            number: A finished group, from whose size the others' is estimated.
        """
        size = sum(file.stat().st_size for file in self._part(number).rglob("*"))
        # the space for the output's second copy is the margin: groups differ
        check_free_space(self.output, self.missing() * size, f"{self.missing()} groups need")

    def join(self, complete: Callable[[Path], object]) -> Counter[str]:
        """Join all parts to the output and remove them; return the counts by name.

        Args:
            complete: Writes the remaining files of the output folder.
        """
        counts: Counter[str] = Counter()
        with self.form.open(self.output) as writer:
            for number in range(self.count):
                part = self._part(number)
                counts.update(self._read_json(part / COUNTS))
                self._copy(writer, part)
            if not writer.samples:
                raise InputError(_nothing(counts, self.folder))
            complete(writer.folder)
            write_atomic(writer.folder / self.SETTINGS_FILE, self._dump_settings())
        shutil.rmtree(self.folder)
        return counts

    def _copy(self, writer: Any, part: Path) -> None:
        try:
            self.form.copy(writer, part)
        except (ValueError, LookupError, TypeError, SafetensorError) as error:
            raise InputError(
                f"{part} is damaged ({shorten(str(error), 200)}): remove it and resume with the "
                "same command, which makes it again."
            ) from error

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise InputError(
                f"{path} is damaged: remove {path.parent} and resume with the same command, which "
                "makes it again."
            )
        return content

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _dump_settings(self) -> str:
        content = {**self.settings, NOTES: self.notes} if self.notes else self.settings
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _nothing(counts: Mapping[str, int], folder: Path) -> str:
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
    return (
        f"No pair was generated ({reasons or 'there was nothing to choose from'}): relax the "
        f"filters, remove {folder} and start again."
    )

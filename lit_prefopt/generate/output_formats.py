"""Output formats of generators: shards of samples, or one table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_prefopt.data.latents.error_table import TABLE, write_table
from lit_prefopt.data.shards.format import IMAGES
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.writer import ShardWriter, shard_number
from lit_prefopt.utils.atomic_files import temporary_folder
from lit_prefopt.utils.os_errors import name_output


class OutputWriter(AbstractContextManager, Protocol):
    """Writer of a folder, which gets its final name when the block ends without an error."""

    folder: Path  # with its temporary name
    samples: int  # written so far


class OutputFormat(Protocol):
    """Format of a folder, shared by the output and its parts."""

    def open(self, folder: Path) -> OutputWriter:
        """Return what writes a folder."""
        ...

    def add(self, writer: Any, made: Iterable[Any]) -> None:
        """Write what a generator made."""
        ...

    def copy(self, writer: Any, part: Path) -> None:
        """Write what a part holds."""
        ...


class ShardFormat:
    """Folders of shards; the generated items write themselves by `write_to`.

    Args:
        kind: Content of the samples, `images` or `latents`.
        numbered: Whether each sample has the number of its shard.
    """

    def __init__(self, kind: str = IMAGES, *, numbered: bool = False) -> None:
        self.kind, self.numbered = kind, numbered

    def open(self, folder: Path) -> ShardWriter:
        """Return what writes a folder."""
        return ShardWriter(folder, kind=self.kind)

    def add(self, writer: ShardWriter, made: Iterable[Any]) -> None:
        """Write what a generator made."""
        for one in made:
            one.write_to(writer)

    def copy(self, writer: ShardWriter, part: Path) -> None:
        """Write the samples of a part, byte by byte."""
        reader = ShardReader(read_index(str(part)))
        for number, shard in enumerate(reader.shards):
            own = shard_number(shard.name) if self.numbered else None
            for sample in range(len(shard.offsets)):
                members = reader.members(number, sample)
                size = (0, 0) if shard.sizes is None else shard.sizes[sample].tolist()
                plain = {name: data for name, data in members.items() if not name.startswith("__")}
                writer.add_members(plain, tuple(size), own, shard.count_of(sample))


class TableFormat:
    """Folders with a table of the reference's errors, written in chunks."""

    def open(self, folder: Path) -> TableWriter:
        """Return what writes a folder."""
        return TableWriter(folder)

    def add(self, writer: TableWriter, made: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write chunks: errors (pairs, draws, K) and quantiles of the levels (pairs, draws)."""
        for errors, u in made:
            writer.append(errors, u)

    def copy(self, writer: TableWriter, part: Path) -> None:
        """Write the table of a part."""
        tensors = load_file(part / TABLE)
        writer.append(tensors["errors"], tensors["u"])


class TableWriter:
    """Writes a folder with one table, which is kept in memory until the end.

    Args:
        output: Output folder.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.samples = output, 0
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> TableWriter:
        """Make the temporary folder beside the output."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.folder = self._stack.enter_context(temporary_folder(self.output))
        self._stack.enter_context(name_output(self.output, self.folder))
        return self

    def append(self, errors: Tensor, u: Tensor) -> None:
        """Append rows.

        Args:
            errors: (pairs, draws, K).
            u: (pairs, draws).
        """
        self._pieces.append((errors, u))
        self.samples += len(errors)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete and rename the folder, or remove it after an error."""
        with self._stack:  # removes the folder, and names the output in errors
            if error is not None:
                raise error
            errors, u = (torch.cat(column) for column in zip(*self._pieces, strict=True))
            write_table(self.folder, errors, u)
            os.rename(self.folder, self.output)

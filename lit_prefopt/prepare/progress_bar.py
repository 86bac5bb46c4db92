"""Progress bar for work with or without a known total."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def progress(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show a progress bar, on a terminal only.

    Args:
        items: The items.
        name: Their name in the plural.
        total: Their number, if it is known.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(name), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        for item in items:
            yield item
            bar.advance(task)

"""Filter what dependencies print about themselves, message by message.

Each message is listed with its own words, so that another warning of the same class is still shown.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

LOGGED = (
    "GPU available: ",  # the number of parameters is logged with the device
    "TPU available: ",
    "HPU available: ",
    "💡 Tip: For seamless cloud ",
)
"""Beginnings of log messages that are not shown."""

WARNED = (
    # hooks and loaders that are meant to be as they are
    "You have overridden `transfer_batch_to_device`",
    ".*`IterableDataset` has `__len__` defined",
    "Total length of `list` across ranks is",
    "predict returned None",
    # frozen networks are meant to be in evaluation mode
    r"Found \d+ module\(s\) in eval mode",
    # steps are counted over all epochs here
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # the command line has checked whose folder it is
    "Checkpoint directory .* exists and is not empty",
    # Lightning's use of torch
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Regular expressions of the beginnings of warnings that are not shown."""

BARS = ("Loading weights",)
"""Progress bars of transformers that are not shown; those of downloads are."""


class _LogFilter(logging.Filter):
    """Drops the messages of `LOGGED`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is shown."""
        return not record.getMessage().startswith(LOGGED)


_FILTER = _LogFilter()


def ignore_warnings() -> None:
    """Ignore the warnings of `WARNED` from now on."""
    for message in WARNED:
        warnings.filterwarnings("ignore", message)


def hide_notices() -> None:
    """Hide the warnings, log messages and progress bars that are listed in this file."""
    ignore_warnings()
    # a filter of a logger is applied to its own messages alone
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_FILTER)
    hooks: Any = importlib.import_module("transformers.utils.logging")
    if hasattr(hooks, "set_tqdm_hook"):
        hooks.set_tqdm_hook(_bar)


def _bar(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return a progress bar of transformers, disabled if it is one of `BARS`."""
    hidden = {"disable": True} if options.get("desc") in BARS else {}
    return factory(*args, **{**options, **hidden})

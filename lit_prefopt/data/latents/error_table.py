"""Table of the reference's denoising errors at fixed draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.format import GENERATION_FILE
from lit_prefopt.errors import InputError
from lit_prefopt.utils.seeds import sample_seed

TABLE = "errors.safetensors"


class ErrorTable:
    """Reads single rows of a table from `lit-prefopt predict --config sd15-reference-cache`.

    The file has `errors`, (pairs, draws, K) float32, and `u`, (pairs, draws) float32, the quantiles
    of their noise levels, in the order in which the pairs are stored; the row of an unreadable pair
    is NaN. It is memory-mapped, so that
    all processes of a machine share its pages.

    Args:
        folder: Local folder of the table.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.settings: dict[str, Any] = json.loads((self.folder / GENERATION_FILE).read_text())
            with safe_open(self.folder / TABLE, "pt") as file:
                self.pairs, self.draws, self.sides = file.get_slice("errors").get_shape()
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{folder} has no reference errors ({error}): run `lit-prefopt predict "
                "--config sd15-reference-cache`, in a local folder."
            ) from error
        self.seed = int(self.settings["seed"])
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker, without the open file."""
        return {**self.__dict__, "_file": None}

    def errors(self, index: int, name: str) -> Tensor:
        """Return the errors of a pair at all draws, (draws, K); raise BrokenSample if unknown.

        Args:
            index: Index of the pair in stored order.
            name: Name of the pair, for the message.
        """
        [row] = self._rows("errors", index, index + 1)
        if not row.isfinite().all():
            raise BrokenSample(f"{name} was broken when the reference's errors were computed")
        return row

    def quantiles(self, pairs: int) -> Tensor:
        """Return the quantiles of the levels of the first pairs' draws, (pairs, draws) float32."""
        return self._rows("u", 0, min(pairs, self.pairs))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._file is None:
            self._file = safe_open(self.folder / TABLE, "pt")
        rows: Tensor = self._file.get_slice(name)[start:stop]
        return rows


def draw_seed(seed: int, index: int, draw: int) -> int:
    """Return the seed of a draw of a pair, equal to that of an epoch in stored order.

    Args:
        seed: Seed of the table.
        index: Index of the pair in stored order.
        draw: Number of the draw, used as the epoch.
    """
    return sample_seed(seed, draw, index)


def write_table(folder: Path, errors: Tensor, u: Tensor) -> None:
    """Write a table into a folder.

    Args:
        folder: An existing folder.
        errors: (pairs, draws, K) float32.
        u: (pairs, draws) float32; below 0 for a pair that could not be read.
    """
    save_file({"errors": errors.contiguous(), "u": u.contiguous()}, folder / TABLE)
    (folder / TABLE).chmod(0o644)  # safetensors sets 0o600

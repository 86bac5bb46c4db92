"""Contact sheet of diptychs, with the reasons for rejection."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lit_prefopt.data.images import to_pil
from lit_prefopt.generate.filters import Diptych
from lit_prefopt.utils.atomic_files import atomic_file

PANEL, SEAM, GAP, LINE = 160, 4, 12, 15  # pixels: a panel, between panels, cards and lines
LETTERS = 52  # per line
KEPT, REFUSED, INK = "#1a7f37", "#b3261e", "#1f2328"


class DiptychSheet:
    """Collects diptychs and draws them as a contact sheet.

    Args:
        path: Output image.
        count: Number of diptychs; 0 for no sheet.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self._cards: list[Image.Image] = []

    def add(self, diptychs: Sequence[Diptych], reasons: Sequence[str | None]) -> None:
        """Add diptychs and redraw the sheet, unless it is full.

        Args:
            diptychs: Generated diptychs.
            reasons: Why each was rejected, or None.
        """
        free = self.count - len(self._cards)
        if free <= 0 or not diptychs:
            return
        some = list(zip(diptychs, reasons, strict=True))[:free]
        self._cards += [draw_card(diptych, reason) for diptych, reason in some]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as stream:
            draw_sheet(self._cards).save(stream, "PNG")


def draw_card(diptych: Diptych, reason: str | None) -> Image.Image:
    """Return an image of a diptych with the changed region framed, its prompts and its status."""
    height = round(PANEL * diptych.left.shape[-2] / diptych.left.shape[-1])
    lines = [
        "kept" if reason is None else f"rejected: {reason}",
        *textwrap.wrap(diptych.prompt, LETTERS, max_lines=2),
        *textwrap.wrap(f"right: {diptych.other}", LETTERS, max_lines=2),
    ]
    result = Image.new("RGB", (2 * PANEL + SEAM, height + 5 * LINE + GAP), "white")
    draw = ImageDraw.Draw(result)
    rows, columns = (torch.nonzero(diptych.change[0].amax(dim)).flatten() for dim in (1, 0))
    for number, image in enumerate((diptych.left, diptych.right)):
        way = Image.Resampling.LANCZOS if image.shape[-1] > PANEL else Image.Resampling.NEAREST
        start = number * (PANEL + SEAM)
        result.paste(to_pil(image).resize((PANEL, height), way), (start, 0))
        if len(rows):
            unit = PANEL / image.shape[-1]
            edges = [columns[0] * unit, rows[0] * unit]
            edges += [(columns[-1] + 1) * unit - 1, (rows[-1] + 1) * unit - 1]
            x, y, right, low = (int(edge) for edge in edges)
            draw.rectangle((x + start, y, right + start, low), outline=REFUSED)
    font = ImageFont.load_default(11)
    for number, line in enumerate(lines):
        fate = KEPT if reason is None else REFUSED
        place = (2, height + 2 + number * LINE)
        draw.text(place, line, fill=INK if number else fate, font=font)
    return result


def draw_sheet(cards: Sequence[Image.Image]) -> Image.Image:
    """Return an image of the cards in rows."""
    across = max(1, math.ceil(math.sqrt(len(cards))))
    width, height = cards[0].size[0] + GAP, max(one.size[1] for one in cards) + GAP
    result = Image.new("RGB", (across * width, math.ceil(len(cards) / across) * height), "white")
    for number, one in enumerate(cards):
        result.paste(one, (number % across * width, number // across * height))
    return result

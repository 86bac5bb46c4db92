"""Evaluation summary for the console: a table and a comparison sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.table import Table

from lit_prefopt.evaluate.rows import SIDES, ComparisonRow

TEXT_HEIGHT = 16


def table(summary: dict[str, Any]) -> Table:
    """Return the summary of `evaluate.summary.summarise` as a table for the terminal."""
    result = Table(title=f"Policy against reference on {summary['prompts']} held-out prompts")
    for heading in ("", "reference", "policy", "difference", "95 % interval"):
        result.add_column(heading, justify="left" if heading == "" else "right")
    for number, (name, values) in enumerate(summary["judges"].items()):
        named = {f"{name} " if number else "reward": values} | values["attributes"]
        for place, (label, row) in enumerate(named.items()):
            low, high = row["difference_ci"]
            cells = [f"{row[side]:.3f}" for side in SIDES] + [f"{row['difference']:+.3f}"]
            result.add_row(label, *cells, f"{low:+.3f} to {high:+.3f}", end_section=place == 0)
        low, high = values["win_rate_ci"]
        result.add_section()
        result.add_row("win rate", "", f"{values['win_rate']:.3f}", "", f"{low:.3f} to {high:.3f}")
        result.add_section()
    return result


def picture_name(number: str, model: str) -> str:
    """Return the file name of a prompt's image by one of the two models."""
    return f"{number}-{model}.png"


def picture_number(prompt: int, image: int) -> str:
    """Return the prefix of an image's file name; a prompt's first image has no image number."""
    return f"{prompt:05d}-{image}" if image else f"{prompt:05d}"


def comparison_sheet(rows: Sequence[ComparisonRow], folder: Path, width: int = 128) -> Image.Image:
    """Return an image with a column per prompt: the reference's image above the policy's.

    Args:
        rows: At least one, all with pictures.
        folder: Base folder of the pictures' paths.
        width: Width of one image in pixels; small ones are upscaled without smoothing.
    """
    margin = 70
    tile = width + TEXT_HEIGHT
    sheet = Image.new("RGB", (margin + len(rows) * (width + 4), 2 * tile), "white")
    draw = ImageDraw.Draw(sheet)
    for line, name in enumerate(SIDES):
        draw.text((4, line * tile + width // 2), name, fill="black")
        for column, row in enumerate(rows):
            judged = row.policy if line else row.reference
            corner = (margin + column * (width + 4), line * tile)
            with Image.open(folder / str(judged.picture)) as image:
                smooth = image.width > width
                way = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
                sheet.paste(image.resize((width, width), way), corner)
            draw.text((corner[0], corner[1] + width + 2), f"{judged.reward:.3f}", fill="black")
    return sheet

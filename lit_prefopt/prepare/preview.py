"""Contact sheet of pairs, for a visual check."""

from __future__ import annotations

import math
import random
import textwrap
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lit_prefopt.data.images import BrokenSample, decode
from lit_prefopt.data.shards.format import SIDES
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import Sample, ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.cells import parse_number
from lit_prefopt.utils.atomic_files import write_atomic

TILE, GAP, EDGE = 256, 8, 16  # pixels: image, gap between images, margin of a card
WIDTH = 2 * TILE + GAP  # of a card's content
LINE, LINES = 22, 3  # height of a line of text, maximum lines of a prompt
COLOURS = {"chosen": "#1a7f37", "rejected": "#b3261e"}
PAGE, CARD, FRAME, INK, FAINT = "#f6f8fa", "white", "#d0d7de", "#1f2328", "#6e7781"


class PreviewCard(NamedTuple):
    """One pair on the sheet, or the reason why it cannot be shown."""

    name: str
    sample: Sample | None
    lines: list[str]  # the prompt, or the reason


def preview(shards: str, output: str, count: int = 16, seed: int = 0) -> None:
    """Draw some pairs side by side, chosen left and rejected right, with prompt, key and label.

    Args:
        shards: Folder or URL of the shards, with their index.json.
        output: Output image: .png, .jpg or .webp.
        count: Number of pairs.
        seed: Seed of the random choice of pairs.
    """
    if count < 1:
        raise InputError(f"count is {count}; give at least 1.")
    entries = _draw(shards, count, seed)
    columns = math.ceil(math.sqrt(len(entries)))
    lines = max(len(entry.lines) for entry in entries)
    width = WIDTH + 2 * EDGE
    height = LINE + TILE + GAP + (lines + 1) * LINE + 2 * EDGE
    across, down = columns, math.ceil(len(entries) / columns)
    sheet = Image.new("RGB", (across * (width + GAP) + GAP, down * (height + GAP) + GAP), PAGE)
    for number, entry in enumerate(entries):
        row, column = divmod(number, columns)
        corner = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        sheet.paste(_card(entry, (width, height)), corner)
    _save(sheet, Path(output))
    print(f"{output}: {len(entries)} pairs")


def _draw(shards: str, count: int, seed: int) -> list[PreviewCard]:
    """Return randomly chosen pairs, in stored order."""
    index = read_index(shards)
    places = [(shard, n) for shard, one in enumerate(index) for n in range(len(one.offsets))]
    if not places:
        raise InputError(f"{shards} holds no samples; name a folder of shards that does.")
    reader = ShardReader(index)
    entries = []
    for shard, number in sorted(random.Random(seed).sample(places, min(count, len(places)))):
        try:
            sample = reader(shard, number)
            entries.append(PreviewCard(sample.name, sample, _lines(sample.text or "(no text)")))
        except BrokenSample as error:
            name = f"{index[shard].name}, sample {number}"
            entries.append(PreviewCard(name, None, _lines(f"Broken: {error}")))
    return entries


def _card(entry: PreviewCard, size: tuple[int, int]) -> Image.Image:
    card = Image.new("RGB", size, CARD)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=FRAME)
    for number, side in enumerate(SIDES):
        left = EDGE + number * (TILE + GAP)
        draw.text((left, EDGE - 2), side, COLOURS[side], _font(15))
        tile = _tile(entry.sample.sides[number]) if entry.sample else _blank("no image")
        card.paste(tile, (left, EDGE + LINE))
    top = EDGE + LINE + TILE + GAP
    for number, line in enumerate(entry.lines):
        draw.text((EDGE, top + number * LINE), line, INK, _font(16))
    bottom = size[1] - EDGE - LINE + 4
    draw.text((EDGE, bottom), entry.name + _caption(entry.sample), FAINT, _font(13))
    return card


def _tile(data: bytes) -> Image.Image:
    try:
        image = decode(data)
    except BrokenSample as error:
        return _blank(f"This image {error}.")
    image = ImageOps.contain(image, (TILE, TILE), Image.Resampling.LANCZOS)
    tile = ImageOps.pad(image, (TILE, TILE), color=PAGE)
    ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline=FRAME)
    return tile


def _blank(words: str) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), PAGE)
    ImageDraw.Draw(tile).text((GAP, GAP), textwrap.fill(words, 30), FAINT, _font(15))
    return tile


def _caption(sample: Sample | None) -> str:
    meta = sample.meta if sample else {}
    return "".join(
        f"   {name} {value:.3g}"
        for name in ("label", "gap", "weight")
        if (value := parse_number(meta.get(name))) is not None
    )


def _lines(text: str) -> list[str]:
    """Wrap a text to a card's width and truncate it to its maximum number of lines."""
    text = " ".join(text.split())
    letter = _font(16).getlength(text) / max(1, len(text))
    letters = max(20, int(0.95 * WIDTH / max(1, letter)))
    return textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _save(sheet: Image.Image, path: Path) -> None:
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in ("PNG", "JPEG", "WEBP"):
        raise InputError(f"{path} is not an image file name; use .png, .jpg or .webp.")
    buffer = BytesIO()
    sheet.save(buffer, form)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}); choose another path."
        raise InputError(message) from error

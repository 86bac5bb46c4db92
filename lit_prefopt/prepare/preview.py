"""Contact sheet of pairs, ranked lists or single images, for a visual check."""

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
from lit_prefopt.data.shards.sides import scores_in
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.cells import parse_number
from lit_prefopt.utils.atomic_files import write_atomic

TILE, GAP, EDGE = 256, 8, 16  # pixels: image, gap between images, margin of a card
WIDTH = 2 * TILE + GAP  # of the content of a pair's card
ACROSS = 4  # most images beside each other; a longer list has several rows
LINE, LINES = 22, 3  # height of a line of text, maximum lines of a prompt
GOOD, BAD = "#1a7f37", "#b3261e"
PAGE, CARD, FRAME, INK, FAINT = "#f6f8fa", "white", "#d0d7de", "#1f2328", "#6e7781"


class PreviewCard(NamedTuple):
    """One sample on the sheet, or the reason why it cannot be shown."""

    name: str
    sample: Sample | None
    text: str  # the prompt, or the reason

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Name and colour of each image."""
        if self.sample is None or len(self.sample.sides) == len(SIDES):
            return [("chosen", GOOD), ("rejected", BAD)]
        if len(self.sample.sides) == 1:
            return [("liked", GOOD) if self.sample.meta.get("label") == 1 else ("disliked", BAD)]
        count = len(self.sample.sides)
        scores = scores_in(self.sample.meta, count) or []
        named = [f"rank {number}" for number in range(1, count + 1)]
        if scores:
            named = [f"{name}   {score:.3g}" for name, score in zip(named, scores, strict=True)]
        return [*zip(named, (GOOD, *[INK] * (count - 2), BAD), strict=True)]


class CardLayout(NamedTuple):
    """Size of the cards of a sheet, which all have the same."""

    across: int  # images beside each other
    down: int  # rows of images
    lines: int  # of the prompt

    @property
    def width(self) -> int:
        """Width of a card's content in pixels."""
        return WIDTH + (self.across - 2) * (TILE + GAP)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a card in pixels."""
        height = self.down * (LINE + TILE + GAP) + (self.lines + 1) * LINE
        return self.width + 2 * EDGE, height + 2 * EDGE


def preview(shards: str, output: str, count: int = 16, seed: int = 0) -> None:
    """Draw some samples with prompt, key and label: pairs side by side, chosen left, lists by rank.

    Args:
        shards: Folder or URL of the shards, with their index.json.
        output: Output image: .png, .jpg or .webp.
        count: Number of samples.
        seed: Seed of the random choice of samples.
    """
    if count < 1:
        raise InputError(f"count is {count}; give at least 1.")
    entries = _draw(shards, count, seed)
    columns = math.ceil(math.sqrt(len(entries)))
    images = max(len(entry.labels) for entry in entries)
    layout = CardLayout(min(max(images, 2), ACROSS), math.ceil(images / ACROSS), lines=0)
    wrapped = [_lines(entry.text, layout.width) for entry in entries]
    layout = layout._replace(lines=max(map(len, wrapped)))
    width, height = layout.size
    across, down = columns, math.ceil(len(entries) / columns)
    sheet = Image.new("RGB", (across * (width + GAP) + GAP, down * (height + GAP) + GAP), PAGE)
    for number, (entry, lines) in enumerate(zip(entries, wrapped, strict=True)):
        row, column = divmod(number, columns)
        corner = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        sheet.paste(_card(entry, lines, layout), corner)
    _save(sheet, Path(output))
    pairs = all(len(entry.labels) == len(SIDES) for entry in entries)
    print(f"{output}: {len(entries)} {'pairs' if pairs else 'samples'}")


def _draw(shards: str, count: int, seed: int) -> list[PreviewCard]:
    """Return randomly chosen samples, in stored order."""
    index = read_index(shards)
    places = [(shard, n) for shard, one in enumerate(index) for n in range(len(one.offsets))]
    if not places:
        raise InputError(f"{shards} holds no samples; name a folder of shards that does.")
    reader = ShardReader(index)
    entries = []
    for shard, number in sorted(random.Random(seed).sample(places, min(count, len(places)))):
        try:
            sample = reader(shard, number)
            entries.append(PreviewCard(sample.name, sample, sample.text or "(no text)"))
        except BrokenSample as error:
            name = f"{index[shard].name}, sample {number}"
            entries.append(PreviewCard(name, None, f"Broken: {error}"))
    return entries


def _card(entry: PreviewCard, lines: list[str], layout: CardLayout) -> Image.Image:
    card = Image.new("RGB", layout.size, CARD)
    draw = ImageDraw.Draw(card)
    width, height = layout.size
    draw.rectangle((0, 0, width - 1, height - 1), outline=FRAME)
    for number, (name, colour) in enumerate(entry.labels):
        row, column = divmod(number, ACROSS)
        left, top = EDGE + column * (TILE + GAP), EDGE + row * (LINE + TILE + GAP)
        draw.text((left, top - 2), name, colour, _font(15))
        tile = _tile(entry.sample.sides[number]) if entry.sample else _blank("no image")
        card.paste(tile, (left, top + LINE))
    top = EDGE + layout.down * (LINE + TILE + GAP)
    for number, line in enumerate(lines):
        draw.text((EDGE, top + number * LINE), line, INK, _font(16))
    bottom = height - EDGE - LINE + 4
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


def _lines(text: str, width: int) -> list[str]:
    """Wrap a text to a width in pixels and truncate it to its maximum number of lines."""
    text = " ".join(text.split())
    letter = _font(16).getlength(text) / max(1, len(text))
    letters = max(20, int(0.95 * width / max(1, letter)))
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

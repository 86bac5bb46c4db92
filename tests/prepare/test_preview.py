"""The contact sheet: what is on it, where, and that broken samples do not spoil it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import preview
from lit_prefopt.prepare.preview import EDGE, GAP, LINE, TILE, WIDTH
from tests.helpers.shards import Maker, picture

TOP = GAP + EDGE + LINE + TILE // 2  # middle of the first row of images


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Return shards of five pairs: red is chosen, blue rejected."""
    red, blue = np.zeros((2, 40, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(5):
            writer.add(f"prompt {number} " + "WORD " * 20 * number, red, blue, {"label": 0.75})
    return str(tmp_path / "shards")


def test_chosen_stands_left_and_rejected_right(shards: str, tmp_path: Path):
    sheet = tmp_path / "new" / "sheet.png"
    main(["shards", "preview", "--shards", shards, "--output", str(sheet), "--count", "3"])
    image = Image.open(sheet)
    assert image.width == 2 * (WIDTH + 2 * EDGE + GAP) + GAP  # three pairs: two and one
    left = GAP + EDGE + TILE // 2
    assert image.getpixel((left, TOP)) == (255, 0, 0)
    assert image.getpixel((left + TILE + GAP, TOP)) == (0, 0, 255)
    text = np.asarray(image.convert("L"))[TOP + TILE // 2 + GAP : TOP + TILE // 2 + 60]
    assert (text < 100).sum() > 100  # ink below the images


def test_the_seed_chooses_the_pairs(shards: str, tmp_path: Path):
    def draw(name: str, **options: int) -> bytes:
        preview(shards, str(tmp_path / name), **options)
        return (tmp_path / name).read_bytes()

    first = draw("1.png", count=2)
    assert first == draw("2.png", count=2)
    assert first != draw("3.png", count=2, seed=1)
    assert len(draw("4.webp", count=99)) > 1000  # more than there are: all


def test_broken_samples_get_their_place(make_shards: Maker, tmp_path: Path):
    folder = make_shards(samples=2, broken={0: b"no image" * 20})
    preview(folder, str(tmp_path / "sheet.png"))
    image = Image.open(tmp_path / "sheet.png")
    assert image.width == 2 * (WIDTH + 2 * EDGE + GAP) + GAP
    left = GAP + EDGE + TILE // 4
    assert image.getpixel((left, TOP)) == (246, 248, 250)  # nothing but the reason at its top
    assert image.getpixel((left + TILE + GAP, TOP)) == (10, 10, 10)


def test_metadata_of_wrong_types_is_left_out(tmp_path: Path):
    with ShardWriter(tmp_path / "odd") as writer:
        odd = {"label": "high", "gap": 10**400, "weight": [1]}
        writer.add("[/bold]", picture(1), picture(2), odd)
    preview(str(tmp_path / "odd"), str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width > WIDTH


def test_bad_wishes_are_refused(shards: str, tmp_path: Path):
    with pytest.raises(InputError, match="use .png, .jpg or .webp"):
        preview(shards, str(tmp_path / "sheet.txt"))
    with pytest.raises(InputError, match="count is 0"):
        preview(shards, str(tmp_path / "sheet.png"), count=0)
    with pytest.raises(InputError, match="has no shards; name .*shards"):
        preview(str(tmp_path), str(tmp_path / "sheet.png"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        preview(shards, str(tmp_path / "file" / "sheet.png"))
    assert not list(tmp_path.glob("*.png"))

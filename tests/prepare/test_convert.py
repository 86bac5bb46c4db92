"""Conversion: what is counted, what is left out, what is refused, and that nothing is half done."""

from __future__ import annotations

import json
import os
import resource
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from lit_prefopt.cli import main
from lit_prefopt.data.images import decode
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import Columns, convert, validate
from tests.helpers.shards import picture
from tests.helpers.sources import pair, ranked, samples, sides, write


def test_pairs_of_paths(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    record = pair() | {"rejected": str(tmp_path / "2.png")}
    summary = convert(write(source, record), str(tmp_path / "out"))
    assert (summary.pairs, summary.images, summary.broken.count) == (1, 2, 0)
    assert "1 pairs from 1 records" in capsys.readouterr().out
    assert samples(tmp_path / "out")[0][1:5] == ("a cat", [picture(1), picture(2)], None, {})


def test_names_of_columns_and_a_folder_of_images(source: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "list.jsonl"
    write(moved, {"words": "a dog", "good": "3.png", "bad": "4.png"})
    columns = Columns(prompt=["nothing", "words"], chosen="good", rejected="bad")
    convert(str(moved), str(tmp_path / "out"), columns=columns, image_folder=str(tmp_path))
    assert sides(tmp_path / "out") == [("a dog", picture(3), picture(4))]


def test_duplicates_and_identical_sides_are_left_out_and_opposed_pairs_kept(
    source: Path, tmp_path: Path
):
    (tmp_path / "copy.png").write_bytes(picture(1))  # the same content under another name
    records = [
        pair(1, 2),
        pair(1, 2) | {"chosen": "copy.png"},
        pair(1, 2, prompt="a dog"),
        pair(2, 1),
        pair(1, 1),
    ]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    assert (summary.pairs, summary.duplicates, summary.opposed, summary.identical) == (3, 1, 1, 1)
    assert len(samples(tmp_path / "out")) == 3


def broken_pictures(folder: Path) -> dict[str, str]:
    """Write pictures that cannot be used, and return what is said of each."""
    jpeg = picture(9, (64, 64), "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[:-40])
    (folder / "cut.png").write_bytes(picture(3)[:60])
    (folder / "cut.webp").write_bytes(picture(3, (64, 64), "WEBP")[:-20])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    wide = BytesIO()
    Image.new("1", (1_000_000, 4)).save(wide, "PNG")
    (folder / "wide.png").write_bytes(wide.getvalue())
    return {
        "cut.jpg": "cannot be decoded (image file is truncated",
        "cut.png": "cannot be decoded",
        "cut.webp": "cannot be decoded",
        "text.png": "is not a png, jpg or webp image",
        "empty.png": "is not a png, jpg or webp image",
        "folder.png": "is not a regular file",
        "wide.png": "is too large with 1000000 x 4 pixels",
        "gone.png": "cannot be read (No such file or directory)",
    }


def test_broken_images_are_named_and_the_conversion_goes_on(source: Path, tmp_path: Path):
    said = broken_pictures(tmp_path)
    records = [pair() | {"rejected": name} for name in said]
    summary = convert(write(source, *records, pair(3, 4)), str(tmp_path / "out"))
    assert sides(tmp_path / "out") == [("a cat", picture(3), picture(4))]
    assert summary.broken.count == len(said)
    for name, (file, reason) in zip(summary.broken.names, said.items(), strict=True):
        assert name.startswith(f"{tmp_path}/{file} {reason}")


def test_a_broken_image_of_a_list_costs_only_its_own_pairs(source: Path, tmp_path: Path):
    (tmp_path / "3.png").write_bytes(b"no image")
    summary = convert(write(source, ranked(ranking=[1, 2, 3, 4])), str(tmp_path / "out"))
    assert (summary.pairs, summary.broken.count, summary.images) == (3, 1, 4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text_of_it": "a cat"}, "line 1 has no text under 'prompt' or 'caption'"),
        (pair(prompt="  "), "line 1 has an empty text"),
        (pair(prompt="\ud800"), "line 1 has a text that is not UTF-8"),
        ({"prompt": "a cat", "best": "1.png"}, "line 1 has no image: .*it has 'prompt', 'best'"),
        ({"prompt": "a cat", "chosen": "1.png"}, "line 1 has no image under 'rejected'"),
        ({"prompt": "a cat", "rejected": "1.png"}, "line 1 has no image under 'chosen'"),
        ({"prompt": "a cat", "jpg_0": "1.png", "label": 1}, "no image under 'jpg_1' or 'image_1'"),
        ({"prompt": "a cat", "chosen": 1, "rejected": 2}, "neither a path nor bytes"),
        (pair() | {"chosen": "\ud800.png"}, "neither a path nor bytes"),
        (pair() | {"chosen": "a\0.png"}, "neither a path nor bytes"),
        (pair() | {"chosen": "https://a.b/c.png"}, "remote image 'https://a.b/c.png'; download it"),
        ({**ranked(), "images": "1.png"}, "has no list of images under 'images'"),
        (ranked(), "no order under 'ranking' or 'rank', 'scores' or"),
        (ranked(ranking=[1, 2]), "not have one number for each of 4 images under 'ranking'"),
        (ranked(scores=[1, 2, 3, float("nan")]), "not have one number for each of 4 images"),
        (ranked(ranking=[1, 2, 3, 4], opinions=[[1, 2]]), "images under 'opinions'"),
        ({"prompt": "a", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": "x"}, "has the label 'x',"),
        ([1], "is not a mapping"),
    ],
)
def test_broken_records_are_named_and_the_conversion_goes_on(
    source: Path, tmp_path: Path, record: object, message: str
):
    with pytest.raises(InputError, match=f"has no usable pair: 1 broken; .*{message}"):
        convert(write(source, record), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    summary = convert(write(source, record, pair()), str(tmp_path / "out"))
    assert (summary.pairs, summary.broken.count) == (1, 1)


def test_bytes_that_are_no_utf8_cost_one_record(source: Path, tmp_path: Path):
    good = json.dumps(pair()).encode()
    lines = [good.replace(b"cat", b"c\xfft"), good, b"{broken", good.replace(b"2.png", b"\xff.png")]
    source.write_bytes(b"\n".join(lines))
    summary = convert(str(source), str(tmp_path / "out"))
    assert summary.pairs == 1
    assert "line 1 has a text that is not UTF-8" in summary.broken.names[0]
    assert "line 3 is not JSON" in summary.broken.names[1]
    assert "\\udcff.png cannot be read" in summary.broken.names[2]


def test_records_without_a_preference_are_counted(source: Path, tmp_path: Path):
    images = {"prompt": "a cat", "jpg_0": "1.png", "jpg_1": "2.png"}
    records = [images | {"label_0": None}, images, images | {"label_0": float("nan")}]
    records += [images | {"label_0": 1.0, "has_label": False}, images | {"label_0": 0.0}]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    assert (summary.pairs, summary.unlabelled, summary.broken.count) == (1, 4, 0)
    assert sides(tmp_path / "out") == [("a cat", picture(2), picture(1))]


def test_a_share_of_broken_records_stops_with_a_sentence(source: Path, tmp_path: Path):
    bad = {"prompt": "a cat"}
    write(source, pair(), bad, pair(2, 3))
    with pytest.raises(InputError, match="Broken: 1 in the first 2 records.*repair or remove"):
        convert(str(source), str(tmp_path / "out"), broken_share=0)
    assert convert(str(source), str(tmp_path / "out"), broken_share=0.1).pairs == 2
    write(source, pair(), *[bad] * 10)
    with pytest.raises(InputError, match="Broken: 6 in the first 7 records"):
        convert(str(source), str(tmp_path / "other"), broken_share=0.1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="broken_share is 2; give a number"):
        convert(str(source), str(tmp_path / "other"), broken_share=2)


def test_many_broken_records_are_counted_and_the_first_named(source: Path, tmp_path: Path):
    summary = convert(write(source, pair(), *[{"prompt": "a"}] * 50), str(tmp_path / "out"))
    assert (summary.broken.count, len(summary.broken.names)) == (50, 20)
    assert summary.broken.lines()[-1] == "and 30 more"


def test_sizes_are_told_and_kept_beside_the_shards(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "large.jpg").write_bytes(picture(7, (40, 60), "JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored lying
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    records = [pair(1, 2), pair() | {"chosen": "large.jpg"}]
    records += [pair() | {"chosen": "large.jpg", "rejected": "turned.jpg"}]
    convert(write(source, *records), str(tmp_path / "out"), resolution=32)
    out = capsys.readouterr().out
    assert "shorter side: smallest 10, median 10, largest 40 pixels" in out
    assert "50.0% of the images are below 32" in out
    assert "images/s" in out
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert facts["unequal_sides"] == 1  # the turned picture has the size of the large one
    assert facts["shorter_side"] == {"smallest": 10, "median": 10, "largest": 40}
    assert (facts["pairs"], facts["share_below_resolution"]) == (3, 0.5)
    assert len(samples(tmp_path / "out")) == 3  # the index is read as before


def test_the_number_of_workers_changes_no_byte(source: Path, tmp_path: Path):
    records = [pair(n % 5, (n + 1 + n // 5) % 5, prompt=f"text {n}") for n in range(40)]
    write(source, *records, {"prompt": "broken"})
    files = {}
    for workers in (1, 5):
        folder = tmp_path / str(workers)
        convert(str(source), str(folder), workers=workers, max_count=7)
        files[workers] = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    assert files[1] == files[5]
    assert len(files[1]) == 7  # five tars, the index, the summary
    with pytest.raises(InputError, match="workers is 0; give at least 1"):
        convert(str(source), str(tmp_path / "none"), workers=0)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(source: Path, tmp_path: Path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (300, 300), "WEBP"))
    write(source, *[pair(n % 5, (n + 1) % 5, prompt=f"text {n}") for n in range(60)])
    before = {path.name for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written .*free disk space"):
            convert(str(source), str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path):
    write(source, pair())
    convert(str(source), str(tmp_path / "out"))
    with pytest.raises(InputError, match="exists and is not empty"):
        convert(str(source), str(tmp_path / "out"))


def transparent(level: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """Return a red png of one opacity."""
    buffer = BytesIO()
    Image.new("RGBA", size, (255, 0, 0, level)).save(buffer, "PNG")
    return buffer.getvalue()


def test_transparent_pictures_are_counted_and_stored_unchanged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "1.png").write_bytes(transparent(0))
    (tmp_path / "3.png").write_bytes(transparent(255))
    summary = convert(write(source, pair(1, 2), pair(3, 4)), str(tmp_path / "out"))
    assert (summary.pairs, summary.transparent) == (2, 1)
    assert "1 pairs have a transparent image, shown on white" in capsys.readouterr().out
    assert sides(tmp_path / "out")[0][1] == transparent(0)
    assert decode(sides(tmp_path / "out")[0][1]).getpixel((0, 0)) == (255, 255, 255)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["transparent"] == 1


@pytest.mark.parametrize(
    ("background", "colour"), [("black", (127, 0, 0)), ("#0000ff", (127, 0, 128))]
)
def test_a_background_is_put_behind_transparent_pictures(
    source: Path, tmp_path: Path, background: str, colour: tuple[int, int, int]
):
    (tmp_path / "1.png").write_bytes(transparent(127))
    arguments = ["--source", write(source, pair(1, 2)), "--output", str(tmp_path / "out")]
    main(["shards", "convert", *arguments, "--background", background])
    [(_, chosen, rejected)] = sides(tmp_path / "out")
    found = Image.open(BytesIO(chosen))
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", colour)
    assert rejected == picture(2)


def test_a_background_that_is_no_colour_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(InputError, match="background is 'glass'; give a colour such as white"):
        convert(write(source, pair()), str(tmp_path / "out"), background="glass")


@pytest.mark.parametrize(
    ("text", "too_long"),
    [
        (" ".join(["word"] * 75), False),
        (" ".join(["word"] * 76), True),
        ("don't " * 37, False),  # two tokens each
        ("1" * 76, True),  # CLIP splits digits
        ("." * 200, False),  # possibly one token
        ("verylongword" * 30, False),
        (", ".join(["4k"] * 26), True),  # a comma, a digit and a letter are three
    ],
)
def test_prompts_beyond_clips_context_are_counted(
    source: Path, tmp_path: Path, text: str, too_long: bool, capsys: pytest.CaptureFixture
):
    summary = convert(write(source, pair(prompt=text)), str(tmp_path / "out"))
    assert summary.long_prompts == too_long
    assert ("longer than the 77 tokens" in capsys.readouterr().out) == too_long
    assert validate(str(tmp_path / "out")).long.count == too_long


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.tar", "pairs.parquet"])
def test_a_pipe_is_refused_as_a_source(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a pipe or a device; write its content to a file"):
        convert(str(tmp_path / name), str(tmp_path / "out"))


def test_pictures_of_phones_and_editors_are_read_and_odd_ones_cost_no_other(
    source: Path, tmp_path: Path
):
    image, preview = Image.open(BytesIO(picture(1))), Image.new("RGB", (4, 4))
    image.save(tmp_path / "0.png", "MPO", save_all=True, append_images=[preview])
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (3 << 20), zip=True)
    image.save(tmp_path / "1.png", pnginfo=texts)
    texts.add_text("more", "x" * (65 << 20), zip=True)
    image.save(tmp_path / "2.png", pnginfo=texts)
    records = [pair(0, 3, "a"), pair(1, 3, "b"), pair(2, 3, "c"), pair(4, 3, "d")]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    assert [text for text, *_ in sides(tmp_path / "out")] == ["a", "b", "d"]
    assert "2.png cannot be decoded" in summary.broken.names[0]
    assert summary.broken.count == 1

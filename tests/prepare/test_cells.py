"""Cells as people have them: labels of other scales, decimals, base64, lists as text."""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_prefopt.errors import InputError
from lit_prefopt.prepare import convert
from lit_prefopt.prepare.cells import list_of_cells, parse_number
from tests.helpers.shards import picture
from tests.helpers.sources import pair, samples, sides, write


def labelled(number: int, label: object) -> dict:
    return {"prompt": f"text {number}", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": label}


@pytest.mark.parametrize("labels", [[1, -1, 0, 0], [1, 2, 2, 1], [90, 10, 50, 0], [0, 0, 0, "-1"]])
def test_a_label_of_another_scale_is_refused(source: Path, tmp_path: Path, labels: list):
    write(source, *[labelled(*entry) for entry in enumerate(labels)])
    with pytest.raises(InputError, match=r"line \d has the label -?\d+, .*write 1 where the first"):
        convert(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_single_slip_among_many_labels_costs_its_own_record(source: Path, tmp_path: Path):
    write(source, *[labelled(number, 7 if number == 3 else 1) for number in range(120)])
    summary = convert(str(source), str(tmp_path / "out"))
    assert (summary.pairs, summary.broken.count) == (119, 1)
    assert "line 4 has the label 7" in summary.broken.names[0]


def test_another_scale_is_refused_before_the_end(source: Path, tmp_path: Path):
    write(source, *[labelled(number, -1) for number in range(6)], *["no record"] * 10_000)
    with pytest.raises(InputError, match="line 1 has the label -1"):
        convert(str(source), str(tmp_path / "out"), broken_share=0.999)


def test_a_tie_stays_one_when_shards_are_converted_again(source: Path, tmp_path: Path):
    write(source, labelled(1, 0.5), labelled(2, 0.8), labelled(3, 1))
    convert(str(source), str(tmp_path / "first"), ties="soft")
    convert(str(tmp_path / "first"), str(tmp_path / "second"), ties="soft")
    assert [sample.meta.get("label") for sample in samples(tmp_path / "second")] == [0.5, 0.8, None]
    assert convert(str(tmp_path / "first"), str(tmp_path / "third")).pairs == 2


def test_decimals_are_labels(tmp_path: Path):
    table = {"prompt": ["a", "b"], "jpg_0": [picture(1)] * 2, "jpg_1": [picture(2)] * 2}
    labels = pa.array([Decimal("1.00"), Decimal("0.00")])
    pq.write_table(pa.table({**table, "label_0": labels}), tmp_path / "p.parquet")
    convert(str(tmp_path / "p.parquet"), str(tmp_path / "out"))
    expected = [("a", picture(1), picture(2)), ("b", picture(2), picture(1))]
    assert sides(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [("0,5", 0.5), (" 7 ", 7), (b"1", 1), (True, 1), ("12,25", 12.25), ("0,125", 0.125)]
    + [(text, None) for text in ("1,234", "x", "", None, [1], 10**400, "1e999", Decimal("sNaN"))],
)
def test_numbers_of_tables(text: object, number: float | None):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('["a.png", "b, c.png"]', ["a.png", "b, c.png"]),
        ("['a.png', 'b.png']", ["a.png", "b.png"]),
        ("a.png|b; c.png", ["a.png", "b; c.png"]),
        ("a.png; b.png", ["a.png", "b.png"]),
        ("a.png,b.png", ["a.png", "b.png"]),
        ("0,5;0,7", ["0,5", "0,7"]),
        ("(1, 2)", [1, 2]),
        ("a.png", None),
        ({"a": 1}, None),
        ("[" * 5000, None),
    ],
)
def test_lists_in_a_cell(text: object, values: list | None):
    assert list_of_cells(text) == values


def test_images_in_base64_are_read_and_never_printed(source: Path, tmp_path: Path):
    encoded = [base64.b64encode(picture(number, (90, 90), "JPEG")).decode() for number in (1, 2)]
    forms = [encoded, [f"data:image/jpeg;base64,{text}" for text in encoded]]
    forms += [[base64.urlsafe_b64encode(picture(n)).decode().rstrip("=") for n in (1, 2)]]
    forms += [["\n".join(text[n : n + 76] for n in range(0, 9999, 76)).strip() for text in encoded]]
    records = [pair(prompt=f"{n}") | dict(zip(("chosen", "rejected"), form, strict=True))
               for n, form in enumerate(forms)]  # fmt: skip
    broken = [
        encoded[0][:-9] + "!",
        "data:image/png,%89PNG",
        "x." * 5000,
        "https://a.b/" + "c" * 999,
    ]
    records += [pair() | {"rejected": text} for text in broken]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    assert [sample.sides[0] for sample in samples(tmp_path / "out")] == [
        *[picture(1, (90, 90), "JPEG")] * 2,
        *(picture(1), picture(1, (90, 90), "JPEG")),
    ]
    reasons = ["not valid base64", "not valid base64", "cannot be read", "has the remote image"]
    assert [r in n for r, n in zip(reasons, summary.broken.names, strict=True)] == [True] * 4
    assert max(len(name) - len(str(tmp_path)) for name in summary.broken.names) < 300


def test_every_value_in_a_message_is_short(source: Path, tmp_path: Path):
    long = "x" * 100_000
    records = [
        labelled(1, long),
        {"prompt": long, long: 1},
        pair() | {"num": long, "chosen": [long]},
    ]
    with pytest.raises(InputError) as caught:
        convert(write(source, *records), str(tmp_path / "out"))
    assert "has no usable pair: 3 broken" in str(caught.value)
    assert len(str(caught.value)) - 4 * len(str(source)) < 1000


def test_the_columns_that_exist_are_listed(tmp_path: Path):
    row = {"prompt": ["a"], "image1": [picture(1)], "image2": [picture(2)], "share": [0.8]}
    pq.write_table(pa.table(row), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="it has 'prompt', 'image1', 'image2', 'share'"):
        convert(str(tmp_path / "p.parquet"), str(tmp_path / "out"))
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "a", "jpg_0": "1", "jpg_1": "2", "liked": 1}))
    with pytest.raises(
        InputError, match="1 unlabelled; .* no preference under 'label_0' or 'label'; .*'liked'"
    ):
        convert(str(one), str(tmp_path / "out"))


def test_a_value_that_python_does_not_have_costs_its_own_row(tmp_path: Path):
    far = pa.array([10**12, None], pa.timestamp("s"))
    table = {"prompt": [b"a", b"b"], "chosen": [picture(1)] * 2, "rejected": [picture(2)] * 2}
    pq.write_table(pa.table({**table, "has_label": far}), tmp_path / "p.parquet")
    summary = convert(str(tmp_path / "p.parquet"), str(tmp_path / "out"))
    assert [text for text, *_ in sides(tmp_path / "out")] == ["b"]
    assert "row 1 has a value that cannot be read" in summary.broken.names[0]


@pytest.mark.parametrize(
    "limit", [{"max_count": -1}, {"max_size": 0}, {"resolution": -5}, {"hold_out": -0.1}]
)
def test_negative_limits_are_refused(source: Path, tmp_path: Path, limit: dict):
    with pytest.raises(InputError, match=f"{next(iter(limit))} is .*; give a number from"):
        convert(write(source, pair()), str(tmp_path / "out"), **limit)

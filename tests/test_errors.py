"""Messages hold no secret, no control character, and no value of any length."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.cli import main
from lit_prefopt.errors import MESSAGE, QUOTED, InputError, is_secret, printable, quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a cat", "'a cat'"),
        (None, "None"),
        (0.5, "0.5"),
        ("two\nlines\x1b[31m", r"'two\nlines\x1b[31m'"),
        ("[/bold]", "'[/bold]'"),
        ("lone \ud800", r"'lone \ud800'"),
    ],
)
def test_short_values_are_quoted_whole(value: Any, shown: str) -> None:
    assert quoted(value) == shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"\xff" * 10**6, 10**3000, ["long" * 99] * 99, {"a" * 999: {"b" * 999: 1}}],
    ids=["text", "bytes", "number", "list", "mapping"],
)
def test_long_values_are_bounded(value: Any) -> None:
    shown = quoted(value)
    assert len(shown) <= QUOTED
    assert "..." in shown


def test_a_message_keeps_its_beginning_and_its_cure() -> None:
    error = InputError(f"{'x' * 10**6} is missing; check the path.")
    assert len(str(error)) < 500
    assert str(error).startswith("xxx")
    assert str(error).endswith(" is missing; check the path.")
    words = InputError(f"The text {'word ' * 10**5} is too long; shorten it.")
    assert len(str(words)) <= MESSAGE
    assert str(words).endswith("is too long; shorten it.")
    assert str(InputError("a\x1b[2J\rb\u202e")) == r"a\x1b[2J\rb\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/a is missing", "http://***@host/a is missing"),
        ("s3://KEY:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("simplecache::https://ghp_t0ken@host/a.tar", "simplecache::https://***@host/a.tar"),
        ("https://h/a?id=7&sig=a%2Fb&sv=1", "https://h/a?id=7&sig=***&sv=1"),
        ("url='https://h/a?X-Amz-Signature=abc'", "url='https://h/a?X-Amz-Signature=***'"),
        ("https://h/a#token=abc", "https://h/a#token=***"),
        # no secrets
        ("http://host:80/me@home", "http://host:80/me@home"),
        ("me@host, and a?b=c", "me@host, and a?b=c"),
        ('["http://host","me@home"]', '["http://host","me@home"]'),
        ("a question?key=1", "a question?key=1"),
        ("https://h/gviz/tq?tqx=out:csv&design=1", "https://h/gviz/tq?tqx=out:csv&design=1"),
    ],
)
def test_secrets_of_addresses_are_hidden(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_of_secret_parameters() -> None:
    secret = "key token sig api_key apiKey AWSAccessKeyId X-Goog-Signature access_token SAS pwd"
    plain = "monkey max_tokens design id tqx passes author keyword sigma"
    assert [name for name in secret.split() if not is_secret(name)] == []
    assert [name for name in plain.split() if is_secret(name)] == []


def test_a_picture_in_a_cell_is_not_the_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = base64.b64encode(random.Random(0).randbytes(300_000)).decode()
    rows = [
        {"prompt": "a", "jpg_0": picture, "jpg_1": "b.png", "label": 1},
        {"prompt": "a", "jpg_0": f"http://h/{picture}", "jpg_1": "b.png", "label": 1},
        {"prompt": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label": picture},
        {"prompt": "a", picture: 1},
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        main(["shards", "convert", "--source", str(source), "--output", str(tmp_path / "out")])
    assert "no usable pair" in str(stop.value.code)
    assert len(str(stop.value.code)) <= MESSAGE + 20
    assert len(capsys.readouterr().out) < MESSAGE


def test_markup_in_names_is_printed_as_it_is(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[bold]" / "[" / "b]pairs"  # a closing tag without an opening one
    folder.mkdir(parents=True)
    for file in Path(shards).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    main(["shards", "validate", "--shards", str(folder)])
    assert "[bold]/[/b]pairs" in "".join(capsys.readouterr().out.split())

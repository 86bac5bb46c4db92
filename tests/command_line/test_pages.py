"""Help pages from data: the same text as jsonargparse prints, at any width."""

from __future__ import annotations

import pytest

from lit_prefopt.command_line.pages import Option, options_of, write_page
from lit_prefopt.command_line.parser import PlainParser
from lit_prefopt.command_line.recording import class_page, printed_page
from tests.command_line.shapes import Plain, small_parser

HELPS = [["fit", "--help"], ["fit", "--model.help", "Plain"]]


def printed(parser: PlainParser, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parser.parse_args(args)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", ["60", "80", "133"])
@pytest.mark.parametrize("args", HELPS, ids=["command", "class"])
def test_a_page_reads_as_the_parser_prints_it(
    args: list[str],
    width: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    expected = printed(small_parser(), args, capsys)
    monkeypatch.setenv("COLUMNS", "90")
    page = printed_page(small_parser(), args)
    monkeypatch.setenv("COLUMNS", width)
    assert write_page(page) == expected
    assert "beta" in expected if "--model.help" in args else "max_steps" in expected


def test_the_options_of_a_page() -> None:
    options = options_of(class_page(Plain, PlainParser), "x.")
    module = "tests.command_line.shapes"
    assert options["beta"] == Option((), pure=False)
    assert options["optimizer"].classes == (f"{module}.Optimizer", f"{module}.Adam")
    assert {"kind", "judge", "judge.help", "link", "limit"} < set(options)

"""Results changed at random: each gives a page, or a sentence; never a trace."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.cli import main
from tests.helpers.evaluations import write_evaluation
from tests.test_fuzz import places

CASES = 60
VALUES: list[Any] = [None, True, -1, 0, 10**400, 1e308, -1e308, 5e-324, "", "x" * 3000, "\ud800"]
VALUES += [[], {}, [[]], {"a": {"b": 1}}, [1, 2], [1e308, -1e308], {"value": 10**400}, "../../x"]


def spoil(folder: Path, draws: random.Random) -> None:
    """Change one or two places of a file, or some of its bytes."""
    path = folder / draws.choice(["evaluation.json", "per_prompt.jsonl"])
    content = bytearray(path.read_bytes())
    if draws.random() < 0.3:
        for _ in range(draws.choice([1, 5])):
            content[draws.randrange(len(content))] = draws.randrange(256)
        path.write_bytes(
            content[: draws.randrange(len(content))] if draws.random() < 0.3 else content
        )
        return
    whole = path.suffix == ".json"
    parsed = [json.loads(part) for part in ([content] if whole else content.splitlines())]
    for _ in range(draws.choice([1, 2])):
        node, key = draws.choice(places(parsed))
        node[key] = draws.choice(VALUES)
    path.write_text("\n".join(json.dumps(part) for part in parsed), encoding="utf-8")


@pytest.mark.parametrize("seed", range(CASES))
def test_mutated_results_are_a_page_or_a_sentence(seed: int, tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "evaluation", count=4, pictures=1)
    spoil(folder, random.Random(seed))
    stop: str | None = None
    try:
        main(["report", "--folder", str(folder)])
    except SystemExit as error:
        stop = str(error.code)
    if stop is None:
        assert (folder / "report.html").stat().st_size > 1000
    else:
        assert stop.startswith("lit-prefopt: ")
        assert len(stop) < 1000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe{}", "is not a text in UTF-8"),
        (b"[" * 100_000, "is incomplete"),
        (b'{"difference": 1' + b"0" * 5000 + b"}", "is incomplete"),
    ],
)
def test_what_is_no_json_is_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(SystemExit, match=f"evaluation.json {sentence}"):
        main(["report", "--folder", str(tmp_path)])

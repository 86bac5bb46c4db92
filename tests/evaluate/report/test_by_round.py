"""The reward by round, from the evidence that each round left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.console import picture_name
from lit_prefopt.evaluate.report.by_round import write_round_report

START = [0.5, 0.6, 0.7, 0.8]


def made(root: Path, number: int, before: list[float], after: list[float]) -> Path:
    """Write a round's evidence."""
    folder = root / f"round-{number}" / "evaluation"
    folder.mkdir(parents=True)
    rows = [
        {"text": f"prompt {i}", "seed": i, "reward_reference": b, "reward_policy": a}
        for i, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    (folder / "per_prompt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images").mkdir()
    for prompt in range(2):
        for side, shade in (("reference", 0), ("policy", (128, 255)[number])):
            name = picture_name(f"{prompt:05d}", side)
            Image.new("RGB", (16, 16), (shade,) * 3).save(folder / "images" / name)
    return folder.parent


def test_every_round_is_compared_with_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = [x + 0.1 for x in START]
    second = [0.9, 0.9, 0.7, 0.7]  # two won, one tied, one lost
    folders = [made(tmp_path, 0, START, first), made(tmp_path, 1, first, second)]
    write_round_report(folders, tmp_path)
    found = json.loads((tmp_path / "rounds.json").read_text())
    assert found["reward_start"] == pytest.approx(0.65)
    one, two = found["rounds"]
    assert one["difference"] == pytest.approx(0.1)
    assert one["difference_ci"] == pytest.approx([0.1, 0.1])
    assert one["win_rate"] == 1
    assert two["reward"] == pytest.approx(0.8)
    assert two["difference"] == pytest.approx(0.15)
    assert two["win_rate"] == pytest.approx(2.5 / 4)
    assert "round-1" in capsys.readouterr().out
    assert Image.open(tmp_path / "rounds.png").size[0] > 300
    sheet = Image.open(tmp_path / "samples.png").convert("RGB")
    shades = [sheet.getpixel((100, y * 144 + 60)) for y in range(3)]
    assert shades == [(0,) * 3, (128,) * 3, (255,) * 3]  # start, round 0, round 1


def test_rounds_on_different_prompts_are_not_compared(tmp_path: Path) -> None:
    folders = [made(tmp_path, 0, START, START), made(tmp_path, 1, START[:3], START[:3])]
    with pytest.raises(InputError, match="different prompts or seeds"):
        write_round_report(folders, tmp_path)


def test_rounds_without_an_evaluation_say_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "round-0").mkdir()
    write_round_report([tmp_path / "round-0"], tmp_path)
    assert "--trainer.callbacks+=Evaluation" in capsys.readouterr().out
    assert not (tmp_path / "rounds.json").exists()


def test_images_of_a_prompt_count_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "round-0" / "evaluation"
    folder.mkdir(parents=True)
    rows = [(0, 0.5, 0.6), (0, 0.5, 0.2), (1, 0.5, 0.9)]
    lines = [
        {"text": "a", "seed": 0, "prompt": p, "reward_reference": b, "reward_policy": a}
        for p, b, a in rows
    ]
    (folder / "per_prompt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "images").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "images" / "00000-reference.png")
    Image.new("RGB", (16, 16)).save(folder / "images" / "00000-policy.png")
    write_round_report([folder.parent], tmp_path)
    [row] = json.loads((tmp_path / "rounds.json").read_text())["rounds"]
    assert row["reward"] == pytest.approx((0.4 + 0.9) / 2)
    assert row["win_rate"] == 0.5


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[]\n", b'{"text": "a", "seed": 0}\n', b"3\n"]
)
def test_damaged_rows_are_a_sentence(content: bytes, tmp_path: Path) -> None:
    folders = [made(tmp_path, 0, START, START), made(tmp_path, 1, START, START)]
    (folders[1] / "evaluation" / "per_prompt.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="round-1.*is damaged: remove .*round-1/done and start"):
        write_round_report(folders, tmp_path)
    assert not (tmp_path / "rounds.json").exists()

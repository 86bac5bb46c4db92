"""A share of the prompts for validation, on one side only and the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.datamodules import PairShards
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import convert
from tests.helpers.sources import pair, samples, write


def prompts(folder: Path) -> set[str]:
    return {sample.text for sample in samples(folder)}


def test_a_share_of_the_prompts_is_held_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = [pair(n % 5, (n + 1) % 5, prompt=f"text {n % 40}") for n in range(60)]
    write(source, *records, {"prompt": "broken"}, pair(1, 3, prompt="  Text  7 "))
    output = tmp_path / "pairs"
    main(["shards", "convert", "--source", str(source), "--output", str(output)]
         + ["--hold_out", "0.1"])  # fmt: skip
    train, validation = prompts(output / "train"), prompts(output / "validation")
    assert len(validation) == 4  # of 41, as `Text  7` is text 7 and broken counts
    assert len({text.lower().replace("  ", " ") for text in train | validation}) == 40
    assert not {text.lower().replace("  ", " ") for text in train} & validation
    facts = json.loads((output / "summary.json").read_text())
    held_out = len(samples(output / "validation"))
    assert facts["held_out"] == {"prompts": 4, "pairs": held_out}
    assert facts["pairs"] == held_out + len(samples(output / "train"))
    assert f"{held_out} of 4 prompts for validation/" in capsys.readouterr().out
    data = PairShards(str(output / "train"), validation=str(output / "validation"), batch_size=2,
                      resolution=8, workers=0)  # fmt: skip
    data.setup("fit")
    held = {text for batch in data.val_dataloader() for text in batch.texts}
    assert held == validation


def test_the_choice_does_not_depend_on_the_order_and_the_format(source: Path, tmp_path: Path):
    records = [pair(n % 5, (n + 1) % 5, prompt=f"text {n}") for n in range(30)]
    chosen = []
    for number, order in enumerate((records, records[::-1])):
        convert(write(source, *order), str(tmp_path / str(number)), hold_out=0.2)
        chosen.append(prompts(tmp_path / str(number) / "validation"))
    table = tmp_path / "p.csv"
    table.write_text("prompt,image,score\n" + "".join(
        f"text {n},{n % 5}.png,1\ntext {n},{(n + 1) % 5}.png,0\n" for n in range(30)))  # fmt: skip
    convert(str(table), str(tmp_path / "csv"), hold_out=0.2)
    chosen.append(prompts(tmp_path / "csv" / "validation"))
    assert len(chosen[0]) == 6
    assert chosen[0] == chosen[1] == chosen[2]


def test_shards_are_split_too(source: Path, tmp_path: Path):
    convert(write(source, *[pair(prompt=f"{n}") for n in range(4)]), str(tmp_path / "all"))
    convert(str(tmp_path / "all"), str(tmp_path / "out"), hold_out=0.01)
    assert len(prompts(tmp_path / "out" / "validation")) == 1
    assert len(prompts(tmp_path / "out" / "train")) == 3


def test_what_cannot_be_split_is_refused_and_leaves_nothing(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="at least two prompts, and there are 1"):
        convert(write(source, pair(), pair(2, 3)), str(out), hold_out=0.5)
    with pytest.raises(InputError, match="give a share below 1"):
        convert(str(source), str(out), hold_out=1)
    (tmp_path / "text.png").write_text("no image")
    bad = [pair(prompt=f"{n}") | {"chosen": "text.png"} for n in range(30)]
    with pytest.raises(InputError, match="prompts for validation have no usable pair"):
        convert(write(source, pair(), *bad), str(out), hold_out=0.03)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(InputError, match="exists and is not empty"):
        convert(write(source, pair(), pair(prompt="b")), str(out), hold_out=0.5)

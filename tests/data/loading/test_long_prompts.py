"""Prompts that a text encoder truncates are counted, in training and in validation."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.loading import long_prompts
from lit_prefopt.data.loading.long_prompts import LongPromptCounter
from lit_prefopt.data.shards.writer import ShardWriter
from tests.helpers.recipes import small_recipe
from tests.helpers.shards import picture

LONG = "longer than a text encoder's context"


def warned(counter: LongPromptCounter, *batches: list[str]) -> list[str]:
    """Return the warnings at batches and at the end."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in batches:
            counter.count(batch)
        counter.finish()
        counter.finish()
    return [str(one.message).split(" training")[0] for one in found]


def short(text: str) -> bool:
    return len(text) < 4


def test_the_first_one_and_the_count_are_told():
    batches = ["a", "b"], ["a", "long", "longer"], ["long", "b"]
    said = warned(LongPromptCounter(short, "training"), *map(list, batches))
    assert said == ["2 of the first 5", "3 of the first 7"]


def test_only_the_first_prompts_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_prompts, "PROMPTS", 3)
    said = warned(LongPromptCounter(short, "training"), ["long", "a"], ["a", "long"], ["long"])
    assert said == ["1 of the first 2", "1 of the first 3"]


def test_without_any_nothing_is_said():
    assert warned(LongPromptCounter(short, "training"), ["a"], ["b"]) == []


@pytest.mark.parametrize("texts", [["0123456789abcdefgh", "cat"], ["cat", "dog"]])
def test_a_run_counts_them(tiny_folder: str, tmp_path: Path, texts: list[str]):
    """The tiny tokenizer has 16 tokens, one for each letter."""
    with ShardWriter(tmp_path / "pairs") as writer:
        for n in range(8):
            writer.add(texts[n % 2], picture(n + 100, (32, 32)), picture(n, (32, 32)))
    recipe = small_recipe(tiny_folder, str(tmp_path / "pairs"), tmp_path / "run")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        main(["fit", *recipe])
        main(["validate", *recipe, "--ckpt_path", "last"])
    said = [str(one.message) for one in found if LONG in str(one.message)]
    counts = [f"4 of the first 8 {which}" for which in ("held-out", "training", "held-out")]
    wanted = counts if "cat" not in texts[0] else []
    for count in set(wanted):
        assert any(one.startswith(count) for one in said), (count, said)
    assert bool(said) == bool(wanted)

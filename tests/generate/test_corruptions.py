"""What the right panel is to show: always something else, always the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError
from lit_prefopt.generate.corruptions import Corruption, MisspeltText, WordSwap
from lit_prefopt.toy import ToyAttributes
from lit_prefopt.toy.scenes import parse, prompts, split

WORDS = ["SALE", "aa", "Book", "oo11", "noon", "x9", "Grüße", "A", "7"]


def made(corruption: Corruption, prompt: str, seed: int) -> str:
    corrupted = corruption.corrupt(prompt, draws.generator(seed, "test"))
    assert corrupted is not None
    assert corrupted.left == prompt
    return corrupted.right


@pytest.mark.parametrize("word", WORDS)
def test_a_misspelling_is_never_the_same_word(word: str) -> None:
    prompt = f'a sign that says "{word}", at night'
    found = {made(MisspeltText(), prompt, seed) for seed in range(60)}
    for right in found:
        assert right.startswith('a sign that says "')
        assert right.endswith('", at night')
        inner = right.removeprefix('a sign that says "').removesuffix('", at night')
        assert inner.casefold() != word.casefold()
        assert abs(len(inner) - len(word)) <= 1
        assert inner
    assert len(found) > 1


def test_each_way_to_misspell() -> None:
    shown = {kind: set() for kind in ("swap", "replace", "drop", "double")}
    for kind, texts in shown.items():
        for seed in range(60):
            right = made(MisspeltText((kind,)), "'abc'", seed)
            texts.add(right.strip("'"))
    assert shown["swap"] == {"bac", "acb"}
    assert shown["drop"] == {"bc", "ac", "ab"}
    assert shown["double"] == {"aabc", "abbc", "abcc"}
    for text in shown["replace"]:
        assert sum(a != b for a, b in zip(text, "abc", strict=True)) == 1


def test_the_seed_decides() -> None:
    prompt = "a shop called “Blue Moon” beside 'Red Sun'"
    one = [made(MisspeltText(), prompt, seed) for seed in range(20)]
    torch.manual_seed(1)
    assert one == [made(MisspeltText(), prompt, seed) for seed in range(20)]
    assert any("Blue Moon" not in text for text in one)
    assert any("Red Sun" not in text for text in one)


@pytest.mark.parametrize("prompt", ["a plain cat", "the dog's bone and the cat's toy", 'empty ""'])
def test_no_text_in_quotes_is_nothing_to_misspell(prompt: str) -> None:
    assert MisspeltText().corrupt(prompt, draws.generator(0, "test")) is None


def test_what_cannot_be_misspelt_that_way_is_left_alone() -> None:
    assert MisspeltText(("swap",)).corrupt("'oo'", draws.generator(0, "test")) is None
    assert MisspeltText(("drop",)).corrupt("'o'", draws.generator(0, "test")) is None


def test_words_of_a_table() -> None:
    table = WordSwap({"left": ["right"], "three": ["two", "four"], "left hand": ["right hand"]})
    found = {made(table, "Three cats on the left", seed) for seed in range(30)}
    assert found == {
        "Two cats on the left",
        "Four cats on the left",
        "Three cats on the right",
    }
    assert made(table, "my left hand", 0) == "my right hand"
    assert table.corrupt("a leftover", draws.generator(0, "test")) is None
    assert table.corrupt("threefold", draws.generator(0, "test")) is None


@pytest.mark.parametrize("of", ["train", "held-out"])
def test_toy_attributes_change_one_thing_on_the_same_side_of_the_split(of: str) -> None:
    changed = set()
    for seed, prompt in enumerate(prompts(80, of)):
        corrupted = ToyAttributes().corrupt(prompt, draws.generator(seed, "test"))
        if corrupted is None:
            assert of == "held-out"  # few of them have neighbours
            continue
        left, right = parse(prompt), parse(corrupted.right)
        assert split(corrupted.right) == of
        pairs = list(zip(left.objects, right.objects, strict=True))
        apart = [
            name
            for one, other in pairs
            for name in ("colour", "shape", "size", "place")
            if getattr(one, name) != getattr(other, name)
        ]
        assert apart == [corrupted.target.kind]
        assert (left.background, left.relation) == (right.background, right.relation)
        changed.add(corrupted.target.kind)
    assert changed == {"colour", "shape", "size"}


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="choose from swap"):
        MisspeltText(("mirror",))
    with pytest.raises(InputError, match="choose from colour"):
        ToyAttributes(("mood",))
    with pytest.raises(InputError, match="has no replacement for cat"):
        WordSwap({"cat": ["Cat"]})
    with pytest.raises(InputError, match="any word"):
        WordSwap({})

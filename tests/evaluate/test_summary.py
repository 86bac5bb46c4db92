"""What rows say together, worked out by hand."""

from __future__ import annotations

import pytest

from lit_prefopt.evaluate.rows import ComparisonRow, ImageScores
from lit_prefopt.evaluate.summary import summarise


def row(
    prompt: int, reference: float, policy: float, image: int = 0, **facts: str | float
) -> ComparisonRow:
    """Return a row of two judges, the second of which says the opposite of the first."""
    sides = [ImageScores({"first": x, "second": -x}) for x in (reference, policy)]
    return ComparisonRow("a text", prompt, *sides, prompt, image, **facts)


def test_one_image_a_prompt() -> None:
    rows = [row(n, *pair) for n, pair in enumerate([(0.2, 0.5), (0.4, 0.4), (0.6, 0.5)])]
    summary = summarise(rows)
    assert summary["reward_reference"] == pytest.approx(0.4)
    assert summary["difference"] == pytest.approx(0.2 / 3)
    assert summary["win_rate"] == 0.5  # one win, one tie, one loss
    assert (summary["prompts"], summary["images_per_prompt"]) == (3, 1)
    first, second = summary["judges"]["first"], summary["judges"]["second"]
    assert first["ties"] == 1
    assert (first["median_reference"], first["median_policy"]) == (0.4, 0.5)
    assert second["difference"] == pytest.approx(-first["difference"])
    assert summary["categories"] == {}
    assert summary["drift"] is summary["diversity"] is summary["ocr"] is None


def test_a_prompt_with_several_images_counts_once() -> None:
    """Two of three images win, but the prompt's mean falls: a loss."""
    own = [row(0, 0.5, x, n) for n, x in enumerate((0.6, 0.6, 0.0))]
    summary = summarise([*own, *(row(1, 0.1, 0.3, n) for n in range(3))])
    assert (summary["prompts"], summary["images_per_prompt"]) == (2, 3)
    assert summary["win_rate"] == 0.5
    assert summary["difference"] == pytest.approx((-0.1 + 0.2) / 2)
    low, high = summary["difference_ci"]
    assert (low, high) == pytest.approx((-0.1, 0.2))  # of two prompts, not of six images


def test_by_category() -> None:
    rows = [row(0, 0, 1, category="a"), row(1, 0, 1, category="b"), row(2, 1, 0, category="b")]
    found = summarise([*rows, row(3, 0, 0)])["categories"]
    assert list(found) == ["a", "b"]
    assert [found[name]["prompts"] for name in found] == [1, 2]
    assert found["a"]["first"]["win_rate"] == 1
    assert found["a"]["second"]["win_rate"] == 0
    assert found["b"]["first"]["win_rate"] == 0.5
    assert found["b"]["first"]["difference"] == 0


def test_attributes_apply_to_some_prompts_only() -> None:
    rows = [row(n, 0, 1) for n in range(3)]
    values = [(0.2, 0.6), (None, None), (0.4, 0.4)]
    for one, pair in zip(rows, values, strict=True):
        for side, value in zip((one.reference, one.policy), pair, strict=True):
            side.attributes = {"first": {"blue": value}, "second": {"odd": 1.0}}
    summary = summarise(rows)
    assert summary["attributes"]["blue"]["difference"] == pytest.approx(0.2)
    assert summary["attributes"]["blue"]["reference"] == pytest.approx(0.3)
    assert list(summary["judges"]["second"]["attributes"]) == ["odd"]


def test_drift_diversity_and_text() -> None:
    rows = [row(n, 0, 1, image, similarity=0.5 + n / 4) for n in range(2) for image in range(2)]
    for one in rows:
        one.reference.alike, one.policy.alike = 0.5, 0.75
    rows[0].reference.read, rows[0].policy.read = 0.0, 1.0
    summary = summarise(rows)
    assert summary["drift"]["value"] == 0.625
    assert summary["diversity"]["difference"] == 0.25
    assert (summary["ocr"]["prompts"], summary["ocr"]["policy"]) == (1, 1)


def test_a_line_says_it_all() -> None:
    said = ImageScores(
        {"a": 0.1, "b": 2.0}, {"a": {"x": None}, "b": {"y": 1.0}}, 0.5, 1.0, "images/1"
    )
    plain = ImageScores({"a": 1 / 3, "b": 2.0})
    one = ComparisonRow("a “fox”\n", 5, plain, said, 2, 1, "foxes", 7, 0.25)
    assert ComparisonRow.from_line(one.line()) == one
    assert one.line().count("\n") == 1

"""The page of an evaluation: what it says, what it leaves out, and that nothing escapes into it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.report.page import write_page
from lit_prefopt.evaluate.report.page_data import labelled_values
from lit_prefopt.evaluate.report.pictures import LONGEST, embed, order_by_interest
from lit_prefopt.evaluate.report.saved_results import read_results
from tests.helpers.evaluations import HOSTILE, write_evaluation, write_folder, write_noise

OLD = {"text": "a red fox", "seed": 0, "reward_reference": 0.25, "reward_policy": 0.75}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes and their texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._script = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._script else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [own for name, own in self.elements if name == tag]


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold an evaluation of twelve prompts and its page."""
    folder = write_evaluation(tmp_path_factory.mktemp("page") / "run" / "evaluation")
    write_page(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


def test_it_says_what_was_found(page: Page, folder: Path) -> None:
    summary = read_results(folder).summary
    exact = summary["judges"]["Exact"]
    assert f"Better by {exact['difference']:.3f}" in page.text
    low, high = exact["difference_ci"]
    assert f"95 % interval {low:+.3f} to {high:+.3f}, clear of zero" in page.text
    assert f"wins {100 * exact['win_rate']:.1f} % of the prompts" in page.text
    assert "Exact: better Second: worse" in page.text
    assert "drift (CLIP similarity)" in page.text
    assert "0.91, 95 % interval 0.9 to 0.92" in page.text
    assert "sampler · steps" in page.text
    titles = [own["data-judge"] for own in page.named("figure") if "data-judge" in own]
    assert sorted(titles) == ["0", "0", "0", "1", "1"]  # the first judge alone has attributes
    assert len(page.named("figure")) == 6  # and the held-out accuracy


def test_the_rows_are_whole(page: Page) -> None:
    assert page.data["sides"] == ["reference", "policy"]
    assert len(page.data["rows"]) == 12
    row = page.data["rows"][3]
    assert row["text"] == HOSTILE
    assert row["scores"][1][0] == 20
    assert row["attributes"]["size"] == [None, None]
    for uri in row["pictures"]:
        assert uri.startswith("data:image/png;base64,")
        assert decoded(uri).size == (32, 32)


def test_strings_stay_strings(page: Page) -> None:
    """A prompt, a category, a model and a setting try to become elements, in each place."""
    assert len(page.named("script")) == 2
    assert "img" not in {tag for tag, _ in page.elements}  # the script alone makes pictures
    assert not [own for _, own in page.elements if any(key.startswith("on") for key in own)]
    assert HOSTILE in {own.get("value") for own in page.named("option")}
    assert page.texts.count(HOSTILE) >= 3  # model, setting, category
    assert "{{ 7 * 7 }}" in page.source
    assert page.source.count("<script") == 2


def test_the_policy_lets_one_script_run_and_nothing_load(page: Page) -> None:
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    links = [own.get(key) for _, own in page.elements for key in ("src", "href", "xlink:href")]
    assert {str(link)[:1] for link in links if link} <= {"#", "d"}  # in the page, or data:
    assert "http:" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page.source)


def test_identifiers_are_there_once(page: Page) -> None:
    names = [own["id"] for _, own in page.elements if own.get("id")]
    assert len(names) == len(set(names))
    used = re.findall(r"url\(#([^)]*)\)", page.source)
    assert used
    assert set(used) <= set(names)


def test_the_same_evidence_gives_the_same_page(folder: Path, page: Page) -> None:
    assert write_page(folder).read_text(encoding="utf-8") == page.source


def test_an_evaluation_of_the_first_format(tmp_path: Path) -> None:
    rows = [OLD | {"attributes_reference": {"colour": None}, "attributes_policy": {"colour": 0.5}}]
    rows += [OLD | {"text": "the sea", "seed": 1}]
    summary = {"prompts": 2, "reward_reference": 0.25, "reward_policy": 0.75, "difference": 0.5}
    summary |= {"difference_ci": [0.5, 0.5], "win_rate": 1.0, "win_rate_ci": [0.34, 1.0]}
    write_noise(tmp_path / "images" / "00001-policy.png", 16)
    page = Page(write_page(write_folder(tmp_path, summary | {"attributes": {}}, rows)))
    assert "Better by 0.500" in page.text
    assert page.data["judges"] == [{"name": "reward", "digits": 3}]
    first, second = page.data["rows"]
    assert first["attributes"] == {"colour": [None, 0.5]}
    assert first["pictures"] == [None, None]
    assert second["pictures"][0] is None
    assert second["pictures"][1].startswith("data:image/png")


@pytest.mark.parametrize("summary", [{}, {"judges": {}, "categories": None, "pinned": []}])
def test_what_is_not_told_is_left_out(tmp_path: Path, summary: dict) -> None:
    write_folder(tmp_path, summary, [])
    page = Page(write_page(tmp_path))
    assert "Policy against reference" in page.text
    assert not {"caption", "figure", "select", "dl"} & {tag for tag, _ in page.elements}
    assert page.data["rows"] == []


def test_without_rows_the_summary_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text((folder / "evaluation.json").read_text())
    page = Page(write_page(tmp_path))
    assert "Better by" in page.text
    assert "Show more" not in page.text


def test_not_a_number_is_none(tmp_path: Path) -> None:
    """Python writes NaN into JSON if asked to; a browser's JSON.parse would stop at it."""
    scores = {"scores_reference": {"A": 1.0}, "scores_policy": {"A": float("nan")}}
    facts = {"reference": 1.0, "policy": float("inf"), "difference": float("nan")}
    write_folder(tmp_path, {"judges": {"A": facts}}, [{"text": "x", **scores}])
    page = Page(write_page(tmp_path))
    assert page.data["rows"][0]["scores"] == [[1.0, None]]
    assert "nan" not in page.text.lower()
    assert "NaN" not in page.scripts[0]


def test_half_a_character_does_not_stop_it(tmp_path: Path) -> None:
    summary = {"models": {"policy": "half \ud83d"}}
    page = Page(write_page(write_folder(tmp_path, summary, [OLD | {"text": "a fox \ud83d"}])))
    assert "half ?" in page.text
    assert page.data["rows"][0]["text"].startswith("a fox")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x, "Better by"),
        (lambda x: -x, "Worse by"),
        (lambda x: 0 * x, "No difference shown"),
    ],
)
def test_the_verdict(tmp_path: Path, change: Callable[[float], float], sentence: str) -> None:
    facts = {"reference": 0.5, "policy": 0.5, "difference": change(0.2)}
    facts["difference_ci"] = sorted([change(0.1), change(0.3)])
    write_folder(tmp_path, {"judges": {"A": facts}}, [])
    assert sentence in Page(write_page(tmp_path)).text


def test_several_images_of_a_prompt_are_one_prompt(tmp_path: Path) -> None:
    rows = [
        OLD | {"prompt": i // 2, "image": i % 2, "seed": i, "reward_policy": policy}
        for i, policy in enumerate([0.95, 0.05, 0.0, 0.1])
    ]
    summary = {"difference": 0.0, "difference_ci": [-1, 1], "reward_reference": 0.25}
    page = Page(write_page(write_folder(tmp_path, summary, rows)))
    # 0.5 against 0.25, and 0.05 against 0.25
    assert "1 better 1 worse" in page.text


def test_a_picture_outside_the_folder_is_not_shown(tmp_path: Path) -> None:
    write_noise(tmp_path / "private.png", 16)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "broken.png").write_bytes(b"no picture")
    row = OLD | {"picture_reference": "../private.png", "picture_policy": "broken.png"}
    page = Page(write_page(write_folder(tmp_path / "run", {}, [row])))
    assert page.data["rows"][0]["pictures"] == [None, None]


def test_a_thousand_prompts_stay_small(tmp_path: Path) -> None:
    """Best and worst are kept, and an even spread between them, until the page is full."""
    noise = [write_noise(tmp_path / "images" / f"{i}.png", 48, i).name for i in range(3)]
    size = 1.4 * (tmp_path / "images" / noise[0]).stat().st_size
    scores = np.random.default_rng(0).normal(0, 1, 1000)
    names = {f"picture_{m}": f"images/{noise[i]}" for i, m in enumerate(("reference", "policy"))}
    rows = [
        OLD | names | {"seed": i, "reward_reference": 0.0, "reward_policy": float(score)}
        for i, score in enumerate(scores)
    ]
    summary = {"difference": 0.0, "difference_ci": [-1, 1]}
    path = write_page(write_folder(tmp_path, summary, rows), max_bytes=1_000_000)
    assert path.stat().st_size < 1_600_000  # pictures, rows, plots
    page = Page(path)
    shown = np.array([row["pictures"][0] is not None for row in page.data["rows"]])
    assert 0.9e6 / (2 * size) < shown.sum() < 1.1e6 / (2 * size)
    order = np.argsort(scores)
    third = int(shown.sum()) // 3
    assert shown[order[:third]].all()
    assert shown[order[-third:]].all()
    between = np.flatnonzero(shown[order[third:-third]])
    assert np.diff(between).max() < 3 * np.diff(between).mean()
    assert f"Pictures of {shown.sum()} of 1000" in page.text
    assert "up to 1 MB" in page.text


def test_every_row_has_its_turn_once() -> None:
    assert order_by_interest([0.0, 3.0, None, -2.0, 1.0]) == [1, 3, 4, 0, 2]
    assert sorted(order_by_interest([float(i % 7) for i in range(100)])) == list(range(100))
    assert order_by_interest([]) == []


def test_large_pictures_shrink_and_small_ones_are_exact(tmp_path: Path) -> None:
    small, large = write_noise(tmp_path / "s.png", 64), write_noise(tmp_path / "l.png", 1000)
    ((one, two),) = embed([(small, large)], [0.0])
    assert np.array_equal(np.asarray(decoded(str(one))), np.asarray(Image.open(small)))
    assert str(two).startswith("data:image/webp")
    assert decoded(str(two)).size == (LONGEST, LONGEST)


def test_facts_are_told_line_by_line() -> None:
    facts = {"a": {"b": {"c": 1}}, "none": None, "range": [0.1, -0.5], "list": ["x", 2], "f": 0.25}
    assert list(labelled_values(facts)) == [
        ("a · b · c", "1"),
        ("range", "0.1 to −0.5"),
        ("list", "x, 2"),
        ("f", "0.25"),
    ]


def test_another_evaluation_stands_beside(tmp_path: Path) -> None:
    ours = write_evaluation(tmp_path / "ours" / "evaluation", gain=0.3)
    theirs = write_evaluation(tmp_path / "theirs" / "evaluation", gain=0.1)
    lines = (theirs / "per_prompt.jsonl").read_text().splitlines()
    (theirs / "per_prompt.jsonl").write_text("\n".join(reversed(lines)))  # the order may differ
    main(["report", "--folder", str(ours), "--other", str(theirs)])
    page = Page(ours / "report.html")
    assert page.data["sides"] == ["reference", "policy", "other"]
    row = page.data["rows"][0]
    assert row["scores"][0][1] - row["scores"][0][2] == pytest.approx(0.2)  # the same draws
    assert len(row["pictures"]) == 3
    assert all(row["pictures"])
    assert "+0.200" in page.text


def test_another_evaluation_of_other_prompts_is_refused(tmp_path: Path, folder: Path) -> None:
    other = write_folder(tmp_path, {}, [OLD])
    with pytest.raises(InputError, match="different prompts or seeds"):
        write_page(folder, other)


def test_another_evaluation_by_other_judges_is_refused(tmp_path: Path) -> None:
    folders = [
        write_folder(tmp_path / name, {"judges": {name: {}}}, [OLD]) for name in ("one", "two")
    ]
    with pytest.raises(InputError, match="no judge in common"):
        write_page(*folders)


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="contains no evaluation.json; name the folder"):
        main(["report", "--folder", str(tmp_path)])
    (tmp_path / "evaluation.json").write_text('{"prompts": ')
    with pytest.raises(SystemExit, match="is incomplete .* with `lit-prefopt test`"):
        main(["report", "--folder", str(tmp_path)])


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("runs/quickstart", "quickstart"),
        ("runs/quickstart/checkpoints/last.ckpt", "quickstart"),
        ("hub/some-model", "some-model"),
        ("last.ckpt", "last.ckpt"),
        (None, "run"),
    ],
)
def test_an_evaluation_is_called_by_its_policy(tmp_path: Path, policy: str, name: str) -> None:
    """Not by the folder that it is written into before it has its own name."""
    summary = {} if policy is None else {"models": {"policy": policy}}
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(summary))
    assert read_results(folder).name == name

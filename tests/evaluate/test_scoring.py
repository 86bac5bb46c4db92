"""What looks at images beside a judge."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.scoring import Scorers, TextReader, quoted
from lit_prefopt.judges import CLIPJudge, Judge
from lit_prefopt.processes.settings import Sampling
from tests.helpers.comparing import asked

FAST = Sampling(steps=2, guidance=2.0, eta=1.0, batch_size=4)


class Brightness(Judge):
    """How bright an image is."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images.mean((1, 2, 3))

    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"left": images[..., : images.shape[-1] // 2].mean((1, 2, 3))}


class Wrong(Judge):
    """Gives no number."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.full((len(images),), torch.nan)


def read(image: Image.Image) -> list[str]:
    """Find text in bright images alone."""
    return ["OPEN", "24 hours"] if image.getpixel((0, 0))[0] > 127 else []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a sign that says "Open"', ["Open"]),
        ("the words “hello” and ‘world’", ["hello", "world"]),
        ("a 'stop' sign", ["stop"]),
        ("the dog's owners' house", []),
        ('an empty "" and a dotted "..."', []),
    ],
)
def test_what_a_prompt_quotes(text: str, found: list[str]) -> None:
    assert quoted(text) == found


def test_text_is_read_where_a_prompt_quotes_some() -> None:
    reader = TextReader(read)
    bright, dark = torch.ones(3, 8, 8), -torch.ones(3, 8, 8)
    assert reader.score(bright, 'a shop: "open", "24 HOURS!"') == 1
    assert reader.score(bright, 'a shop: "open", "closed"') == 0
    assert reader.score(dark, 'a shop: "open"') == 0
    assert reader.score(bright, "a shop") is None
    assert "test_scoring" in reader.settings()["reader"]


def test_judges_have_names_of_their_own() -> None:
    panel = Scorers(Brightness(), {"again": Brightness()})
    [said] = panel.score_images(torch.ones(1, 3, 4, 4), ["a"])
    assert said.scores == {"Brightness": 1.0, "again": 1.0}
    assert said.attributes == {"Brightness": {"left": 1.0}, "again": {"left": 1.0}}
    assert panel.settings()["judges"]["again"]["class"] == "Brightness"
    for name in ("Brightness", "prompts"):
        with pytest.raises(InputError, match="other names"):
            Scorers(Brightness(), {name: Brightness()})


def test_a_judge_that_gives_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="fix the judge"):
        Scorers(Wrong()).score_images(torch.ones(1, 3, 4, 4), ["a"])


def test_likeness(backbone: StableDiffusion, tiny_clip_folder: str) -> None:
    """Worked out image by image; equal images are equally far from all others."""
    clip = CLIPJudge(tiny_clip_folder)
    panel = Scorers(Brightness(), similarity=clip)
    answers = asked(backbone, panel, ["a", "b"], FAST, reference_seed=100, images=3)
    places = [
        torch.nn.functional.normalize(clip.image_features(answer.after[None], None)[0], dim=0)
        for answer in answers
    ]
    others = [float(places[0] @ places[n]) for n in (1, 2)]
    assert answers[0].row.policy.alike == pytest.approx(sum(others) / 2, abs=1e-5)
    before = clip.image_features(answers[4].before[None], None)[0]
    own = float(torch.nn.functional.normalize(before, dim=0) @ places[4])
    assert answers[4].row.similarity == pytest.approx(own, abs=1e-5)
    same = asked(backbone, panel, ["a", "b"], FAST)
    assert [a.row.similarity for a in same] == pytest.approx([1, 1], abs=1e-5)
    assert all(answer.row.policy.alike is None for answer in same)

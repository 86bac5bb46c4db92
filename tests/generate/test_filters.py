"""The filters against diptychs whose truth is known."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.generate.change_mask import ChangeMask
from lit_prefopt.generate.corruptions import CorruptionTarget
from lit_prefopt.generate.filters import (
    AttributeHolds,
    CallableFilter,
    Diptych,
    Filter,
    LocalChange,
    MinimumChange,
    TextHolds,
    first_rejections,
)
from lit_prefopt.toy import ToyJudge
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import parse

RED = "a large red circle on the left of a black background"
BLUE = "a large blue circle on the left of a black background"
AWAY = "a large blue circle on the right of a white background"


def diptych(left: Tensor, right: Tensor, target: CorruptionTarget | None = None) -> Diptych:
    change = ChangeMask(dilation=1)(left[None], right[None])[0]
    return Diptych(RED, BLUE, target or CorruptionTarget("colour", RED, BLUE), left, right, change)


def picture(caption: str) -> Tensor:
    return render([parse(caption)])[0]


def test_the_mask_is_where_the_halves_differ() -> None:
    left, right = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    right[0, :, 4:6, 7] = 0.5  # a quarter of the range
    right[1, 0, 8, 8] = 0.5  # a twelfth over the channels
    for dilation in (0, 1, 3):
        mask = ChangeMask(0.1, dilation)(left, right)
        expected = torch.zeros(2, 1, 16, 16)
        expected[0, :, 4 - dilation : 6 + dilation, 7 - dilation : 8 + dilation] = 1
        assert torch.equal(mask, expected)
    assert ChangeMask(0.08, 0)(left, right)[1].sum() == 1


def test_the_attribute_holds_on_the_left_alone() -> None:
    judged = AttributeHolds(ToyJudge(), 0.8, 0.6)
    cases = [(RED, BLUE), (BLUE, BLUE), (RED, RED), (BLUE, RED)]
    reasons = judged.reasons([diptych(picture(a), picture(b)) for a, b in cases])
    assert reasons == [
        None,
        "with the wrong thing on the left",
        "with the right thing on the right",
        "with the wrong thing on the left",
    ]
    other = CorruptionTarget("mood", RED, BLUE)
    with pytest.raises(InputError, match="does not score mood"):
        judged.reasons([diptych(picture(RED), picture(BLUE), other)])


def test_similar_looks_outside_the_change_alone() -> None:
    random = torch.Generator().manual_seed(0)
    left = torch.rand(3, 48, 48, generator=random) * 2 - 1
    patch = left.clone()
    patch[:, 10:20, 10:20] *= -1
    faint = (patch + 0.19 * torch.randn(left.shape, generator=random)).clamp(-1, 1)
    wide = left.clone()
    wide[:, 4:44, 4:44] *= -1
    similar = LocalChange(0.9, 0.5)
    found = similar.reasons([diptych(left, x) for x in (left, patch, faint, wide, -left)])
    reason = "with halves that differ elsewhere"
    assert found == [None, None, reason, reason, reason]


def test_halves_that_are_alike_are_left_out() -> None:
    left = picture(RED)
    found = MinimumChange().reasons([diptych(left, left), diptych(left, picture(BLUE))])
    assert found == ["with halves that are alike", None]


def test_a_chain_asks_each_filter_about_what_the_others_let_pass() -> None:
    seen: list[str] = []

    def blue(
        left: Image.Image, right: Image.Image, prompt: str, other: str, t: CorruptionTarget
    ) -> bool:
        assert (left.size, right.size, prompt, other) == ((32, 32), (32, 32), RED, BLUE)
        seen.append(t.kind)
        return right.getpixel((10, 16))[2] > 200

    chain: list[Filter] = [
        MinimumChange(),
        CallableFilter(blue, "that are not blue"),
        LocalChange(0.8),
    ]
    captions = [RED, BLUE, RED.replace("red", "green"), AWAY]
    found = first_rejections(chain, [diptych(picture(RED), picture(c)) for c in captions])
    assert found[:3] == ["with halves that are alike", None, "that are not blue"]
    assert found[3] == "with halves that differ elsewhere"
    assert len(seen) == 3
    assert first_rejections([], [diptych(picture(RED), picture(BLUE))]) == [None]


def reader(image: Image.Image) -> list[str]:
    """Reads the first pixel."""
    return {0: [], 1: ["HELLO"], 2: ["helo"], 3: ["say: Hel", "lo!"], 4: ["helloo"]}[
        image.getpixel((0, 0))[0] // 50
    ]


@pytest.mark.parametrize(
    ("left", "right", "wrong", "reason"),
    [
        (1, 2, "helo", None),
        (3, 2, "helo", None),
        (1, 0, "helo", None),
        (2, 2, "helo", "with the wrong text on the left"),
        (1, 1, "helo", "with the right text on the right"),
        (0, 0, "helo", "without any text that the reader finds"),
        (1, 4, "HELLOO", None),
        (4, 4, "HELLOO", "with the wrong text on the left"),
    ],
)
def test_text_holds_on_the_left_alone(
    left: int, right: int, wrong: str, reason: str | None
) -> None:
    halves = [torch.full((3, 8, 8), (50 * n + 25) / 127.5 - 1) for n in (left, right)]
    asked = diptych(*halves, CorruptionTarget("text", "Hello", wrong))
    assert TextHolds(reader).reasons([asked]) == [reason]


def test_the_reader_of_text_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[ocr\]"):
        TextHolds()


def test_text_is_read_by_rapidocr() -> None:
    pytest.importorskip("rapidocr", reason="pip install lit-prefopt[ocr]")

    def written(text: str) -> Tensor:
        page = Image.new("RGB", (256, 256), "white")
        font = ImageFont.load_default(56)
        ImageDraw.Draw(page).text((20, 90), text, fill="black", font=font)
        pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
        return pixels.view(256, 256, 3).permute(2, 0, 1) / 127.5 - 1

    target = CorruptionTarget("text", "BAKERY", "BAKREY")
    right, same, none = written("BAKREY"), written("BAKERY"), torch.ones(3, 256, 256)
    asked = [diptych(same, right, target), diptych(same, same, target), diptych(none, none, target)]
    assert TextHolds().reasons(asked) == [
        None,
        "with the right text on the right",
        "without any text that the reader finds",
    ]


def test_bad_settings_are_refused() -> None:
    for bad in (
        lambda: ChangeMask(threshold=0),
        lambda: ChangeMask(dilation=-1),
        lambda: MinimumChange(0),
        lambda: LocalChange(2),
        lambda: AttributeHolds(ToyJudge(), 0.5, 0.6),
    ):
        with pytest.raises(InputError):
            bad()

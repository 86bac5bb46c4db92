"""The web of diptychs: two panels, one scene but for what the caption says, nothing held out."""

from __future__ import annotations

import torch

from lit_prefopt.toy import ToyDiffusion, ToyDiptychWeb, ToyJudge
from lit_prefopt.toy.diptychs import TEMPLATE, diptych_pictures
from lit_prefopt.toy.scenes import all_scenes, parse, split


def panels(texts: list[str]) -> tuple[list[str], list[str]]:
    left, right = zip(*(text.split(" | ") for text in texts), strict=True)
    return list(left), list(right)


def test_both_panels_show_what_the_caption_says() -> None:
    batch = diptych_pictures(0, 128, 0)
    assert batch.images.shape == (128, 1, 3, 32, 64)
    left, right = panels(batch.texts)
    judge, images = ToyJudge(), batch.images[:, 0]
    for texts, part in ((left, images[..., :32]), (right, images[..., 32:])):
        assert judge.score(part, texts).mean() > 0.99
    differs = [a != b for a, b in zip(left, right, strict=True)]
    assert sum(differs) > 120
    # the same jitter: panels agree but for one object
    same = (images[..., :32] == images[..., 32:]).all(1).float().mean()
    assert 0.85 < same < 1


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, same, other = (diptych_pictures(s, 16, 5, 0.3, 0.5, 0.5, 0.1) for s in (3, 3, 4))
    assert torch.equal(one.images, same.images)
    assert one.texts == same.texts
    assert not torch.equal(one.images, other.images)


def test_flaws_and_lies() -> None:
    judge = ToyJudge()
    plain = diptych_pictures(0, 96, 0)
    wrong = diptych_pictures(0, 96, 0, wrong_caption=1.0)
    flawed = diptych_pictures(0, 96, 0, flawed_picture=1.0)
    assert torch.equal(wrong.images[..., :32], wrong.images[..., 32:])
    left, right = panels(flawed.texts)
    scores = [
        judge.score(flawed.images[:, 0, :, :, part], texts)
        for part, texts in ((slice(32), left), (slice(32, 64), right))
    ]
    assert scores[0].mean() < 0.95
    assert (scores[0] - scores[1]).abs().mean() < 0.05  # one flaw for both
    assert not torch.equal(plain.images, flawed.images)


def test_held_out_captions_stay_out() -> None:
    batch = diptych_pictures(0, 400, 1, caption_dropout=0.2)
    left, right = panels([text for text in batch.texts if text])
    assert 0.14 < batch.texts.count("") / 400 < 0.26
    assert {split(text) for text in left + right} == {"train"}
    held_out = next(iter(ToyDiptychWeb(batch_size=64, val_steps=1).val_dataloader()))
    assert {split(t) for t in sum(panels(held_out.texts), [])} == {"held-out"}


def test_the_tokenizer_holds_every_diptych() -> None:
    backbone = ToyDiffusion(reference="none")
    longest = max((scene.caption() for scene in all_scenes()), key=lambda c: len(c.split()))
    whole = TEMPLATE.format(left=longest, right=longest)
    assert len(parse(longest).objects) == 2
    assert backbone.fits_context(whole)
    assert not backbone.fits_context(whole + " | " + longest)
    assert (
        backbone.tokenizer.decode(backbone.tokenizer(whole).input_ids, skip_special_tokens=True)
        == whole
    )

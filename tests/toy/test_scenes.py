import random

import pytest
import torch

from lit_prefopt.toy import ToyPrompts
from lit_prefopt.toy.render import SHAPES, layout, render, shape_masks
from lit_prefopt.toy.scenes import all_scenes, captions, changes, parse, prompts, split, unused


def test_caption_and_scene_say_the_same() -> None:
    scenes = all_scenes()
    texts = [scene.caption() for scene in scenes]
    assert len(set(texts)) == len(scenes) == 6480
    assert [parse(text) for text in texts] == scenes
    assert max(len(text.split()) for text in texts) <= 22


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle on the left of a black background",
        "a large red circle in the left of a black background",
        "a red circle above a red square on a white background",
        "a large red circle above a blue square on a white background",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption of the toy world; try"):
        parse(text)


def test_the_splits_are_disjoint_and_complete() -> None:
    train = {*captions("train", False), *captions("train", True)}
    held_out = {*captions("held-out", False), *captions("held-out", True)}
    assert not train & held_out
    assert len(train | held_out) == 6480
    assert 0.08 < len(held_out) / 6480 < 0.12
    # the split must never move: checkpoints were trained on one side of it
    assert split("a large red circle on the left of a black background") == "train"
    assert split(captions("held-out", False)[0]) == "held-out"


def test_prompts_are_distinct_and_repeatable() -> None:
    chosen = prompts(200, "held-out", two_objects=0.75)
    assert chosen == prompts(200, "held-out", two_objects=0.75)
    assert chosen != prompts(200, "held-out", two_objects=0.75, seed=1)
    assert len(set(chosen)) == 200
    assert all(split(text) == "held-out" for text in chosen)
    assert sum(parse(text).relation is not None for text in chosen) == 150
    with pytest.raises(ValueError, match="lower count or change two_objects"):
        prompts(1000, "held-out", two_objects=0.5)


def test_changes_differ_in_one_attribute() -> None:
    for scene in random.Random(0).sample(all_scenes(), 100):
        for attribute in scene.attributes:
            others = changes(scene, attribute)
            assert others
            for other in others:
                words = zip(
                    scene.caption().replace(" of", "").split(),
                    other.caption().replace(" of", "").split(),
                    strict=True,
                )
                changed = [pair for pair in words if pair[0] != pair[1]]
                # "in the middle" and "on the left" differ in their preposition too
                assert len(changed) == 1 or attribute == "place"


def test_shapes_have_the_area_they_are_asked_for() -> None:
    masks = shape_masks(torch.tensor([[16.0, 16.0]]).expand(3, 2), torch.tensor([55.0, 75, 150]))
    assert masks.shape == (3, len(SHAPES), 32, 32)
    wanted = torch.tensor([[55.0], [75], [150]]).expand(3, 4)
    torch.testing.assert_close(masks.sum((-1, -2)), wanted, rtol=0.06, atol=0)


def test_rendering_is_repeatable_and_varies() -> None:
    scenes = random.Random(1).sample(all_scenes(), 8)
    one, same, other = (render(scenes, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == (8, 3, 32, 32)
    assert one.dtype == torch.float32
    assert one.aminmax() == (one.amin().clamp(min=-1), one.amax().clamp(max=1))
    assert torch.equal(one, same)
    assert ((one - other).abs().amax((1, 2, 3)) > 0.1).all()
    assert torch.equal(render(scenes), render(scenes))


def test_layout_of_a_relation() -> None:
    plan = layout([parse("a red circle above a blue square on a white background")])
    assert plan.two.all()
    assert plan.centres[0, 0, 1] < plan.centres[0, 1, 1]  # y points down


def test_settings_are_chosen_on_captions_that_no_figure_is_told_on() -> None:
    chosen = ToyPrompts(128, "validation").texts()
    assert chosen == unused(345)[:128]
    assert len(set(chosen)) == 128
    assert all(split(text) == "held-out" for text in chosen)
    for count in (64, 128, 256):
        assert not {*unused(345)} & {*ToyPrompts(count).texts()}
    # they must never move either: rows of tunings were told on them
    assert chosen[0] == "a blue cross right of a purple square on a black background"
    with pytest.raises(ValueError, match=r"345 held-out captions are unused, not 346"):
        unused(346)

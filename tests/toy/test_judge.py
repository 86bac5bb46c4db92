import random

import pytest
import torch
from torch import Tensor

from lit_prefopt.toy.flaws import blur, dim
from lit_prefopt.toy.judge import ATTRIBUTES, ToyJudge
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import Scene, all_scenes, changes

JUDGE = ToyJudge()


def some_scenes(two_objects: bool, count: int = 300) -> list[Scene]:
    pool = [scene for scene in all_scenes() if (scene.relation is not None) == two_objects]
    return random.Random(0).sample(pool, count)


def drawn(scenes: list[Scene], seed: int = 0) -> Tensor:
    return render(scenes, torch.Generator().manual_seed(seed))


def texts(scenes: list[Scene]) -> list[str]:
    return [scene.caption() for scene in scenes]


@pytest.mark.parametrize("two_objects", [False, True])
def test_the_right_scene_scores_one_on_every_attribute(two_objects: bool) -> None:
    scenes = some_scenes(two_objects)
    scores = JUDGE.attributes(drawn(scenes), texts(scenes))
    assert tuple(scores) == ATTRIBUTES
    for name, score in scores.items():
        if name == "cleanness" or name in scenes[0].attributes:
            assert (score > 0.97).all(), name
        else:
            assert score.isnan().all(), name
    mean = JUDGE.score(drawn(scenes), texts(scenes))
    assert mean.shape == (300,)
    assert mean.dtype == torch.float32
    assert (mean > 0.98).all()


@pytest.mark.parametrize(
    ("two_objects", "attribute", "most"),
    [
        (False, "colour", 0.1),
        (False, "shape", 0.1),
        (False, "size", 0.1),
        (False, "place", 0.3),
        (False, "background", 0.1),
        (True, "colour", 0.4),  # one of two objects
        (True, "shape", 0.6),  # one of two objects
        (True, "background", 0.1),
        (True, "relation", 0.3),
    ],
)
def test_one_wrong_attribute_lowers_its_own_score(
    two_objects: bool, attribute: str, most: float
) -> None:
    scenes = some_scenes(two_objects)
    chance = random.Random(1)
    wrong = [chance.choice(changes(scene, attribute)) for scene in scenes]
    scores = JUDGE.attributes(drawn(wrong), texts(scenes))
    assert (scores.pop(attribute) < most).all()
    for name, score in scores.items():
        assert score.isnan().all() or (score > 0.94).all(), name


@pytest.mark.parametrize("two_objects", [False, True])
def test_blur_dim_light_and_noise_lower_cleanness(two_objects: bool) -> None:
    scenes = some_scenes(two_objects)
    images = drawn(scenes)

    def cleanness(pictures: Tensor) -> float:
        return JUDGE.attributes(pictures, texts(scenes))["cleanness"].mean().item()

    count = torch.ones(len(images))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for worse in (
        [blur(images, sigma * count) for sigma in (0.0, 1.0, 1.5, 2.0)],
        [dim(images, light * count) for light in (1.0, 0.9, 0.8, 0.7)],
        [images + scale * noise for scale in (0.0, 0.1, 0.2, 0.3)],
    ):
        values = [cleanness(pictures) for pictures in worse]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0.97
        assert values[1] < 0.8


def test_meaningless_pictures_score_low() -> None:
    scenes = some_scenes(False) + some_scenes(True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(scenes), 3, 32, 32, generator=generator) * 2 - 1
    assert JUDGE.score(noise, texts(scenes)).mean() < 0.2
    assert JUDGE.score(torch.zeros_like(noise), texts(scenes)).mean() < 0.2
    other = scenes[7:] + scenes[:7]
    assert JUDGE.score(drawn(other), texts(scenes)).mean() < 0.75


def test_a_larger_displacement_scores_lower() -> None:
    scenes = some_scenes(False, 50)
    places = []
    for pixels in (2.0, 3.0, 4.0, 5.0):
        away = torch.zeros(50, 2, 2)
        away[:, 0] = torch.where(torch.arange(50)[:, None] % 2 > 0, pixels, -pixels) / 2**0.5
        images = render(scenes, displace=away)
        places.append(JUDGE.attributes(images, texts(scenes))["place"].mean().item())
    assert places == sorted(places, reverse=True)
    assert places[0] - places[-1] > 0.3


def test_a_picture_is_judged_alone() -> None:
    scenes = some_scenes(False, 5) + some_scenes(True, 5)
    images = drawn(scenes)
    together = JUDGE.score(images, texts(scenes))
    apart = torch.cat([JUDGE.score(images[i : i + 1], texts(scenes)[i : i + 1]) for i in range(10)])
    torch.testing.assert_close(together, apart)


def test_bad_input_is_refused() -> None:
    (scene,) = some_scenes(False, 1)
    image = drawn([scene])
    with pytest.raises(ValueError, match="NaN or infinite"):
        JUDGE.score(image * torch.nan, [scene.caption()])
    with pytest.raises(ValueError, match="resize them first"):
        JUDGE.score(image[..., :16], [scene.caption()])
    with pytest.raises(ValueError, match="one text per image"):
        JUDGE.score(image, [])
    with pytest.raises(ValueError, match="not a caption of the toy world"):
        JUDGE.score(image, ["a photo of a cat"])

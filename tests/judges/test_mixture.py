"""Mixtures of judges, and judges as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_prefopt.data.images import decode
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.judges import CalibratedJudges, Judge, JudgeMetric, WeightedJudges

TEXTS = ["a", "bb", "ccc", "dddd"]
IMAGES = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).repeat(1, 3, 8, 8)


class Bright(Judge):
    """Prefers what is bright."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        self.asked += 1
        return images.mean((1, 2, 3)) + (0 if t is None else t.to(images))


class Wordy(Judge):
    """Prefers long prompts, on another scale."""

    prepared = False

    def prepare(self) -> None:
        self.prepared = True

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.tensor([100.0 * len(text) for text in texts])


class Broken(Judge):
    """Does not know."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.full((len(images),), torch.nan)


def test_a_weighted_sum_and_its_parts() -> None:
    bright, wordy = Bright(), Wordy()
    mixture = WeightedJudges([bright, wordy], [2.0, 0.01])
    mixture.prepare()
    assert wordy.prepared
    expected = 2 * IMAGES.mean((1, 2, 3)) + torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(mixture.score(IMAGES, TEXTS), expected)
    parts = mixture.attributes(IMAGES, TEXTS)
    assert bright.asked == 1  # the same images and prompts are not judged twice
    assert list(parts) == ["Bright", "Wordy"]
    torch.testing.assert_close(parts["Wordy"], torch.tensor([100.0, 200, 300, 400]))
    torch.testing.assert_close(
        WeightedJudges([bright, bright]).score(IMAGES, TEXTS), parts["Bright"]
    )
    t = torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(mixture.score(IMAGES, TEXTS, t), expected + 2 * t)
    changed = IMAGES.clone()
    mixture.score(changed, TEXTS)
    changed.add_(1)  # the same tensor, with other numbers in it
    torch.testing.assert_close(mixture.score(changed, TEXTS), expected + 2)
    with torch.inference_mode():
        seen = IMAGES.clone()
        mixture.score(seen, TEXTS)
        seen.add_(1)
        torch.testing.assert_close(mixture.score(seen, TEXTS), expected + 2)
    facts = mixture.settings()
    assert (facts["class"], facts["weights"]) == ("WeightedJudges", [2.0, 0.01])
    assert [one["class"] for one in facts["judges"]] == ["Bright", "Wordy"]


def test_stated_calibration() -> None:
    mixture = CalibratedJudges([Bright(), Wordy()], means=[0.5, 250.0], deviations=[0.25, 50.0])
    bright, wordy = (IMAGES.mean((1, 2, 3)) - 0.5) / 0.25, torch.tensor([-3.0, -1, 1, 3])
    torch.testing.assert_close(mixture.score(IMAGES, TEXTS), (bright + wordy) / 2)
    torch.testing.assert_close(mixture.attributes(IMAGES, TEXTS)["Wordy"][0].item(), 100.0)


def test_measured_calibration(shards: str) -> None:
    mixture = CalibratedJudges([Bright(), Wordy()], measured_on=shards, images=31)
    mixture.prepare()
    assert mixture.settings()["means"] is None
    scores = mixture.score(IMAGES, TEXTS)
    reader = ShardReader(find_shards(shards))
    samples = [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]
    seen = [
        (np.array(decode(side)).mean() / 127.5 - 1, 100.0 * len(sample.text))
        for sample in samples
        for side in sample.sides
    ][:31]
    facts = mixture.settings()
    assert facts["means"] == pytest.approx(np.mean(seen, 0), rel=1e-4)
    assert facts["deviations"] == pytest.approx(np.std(seen, 0), rel=1e-4)
    stated = CalibratedJudges(
        [Bright(), Wordy()], means=facts["means"], deviations=facts["deviations"]
    )
    torch.testing.assert_close(scores, stated.score(IMAGES, TEXTS))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"judges": []}, "A mixture needs judges"),
        ({"judges": [Bright()], "weights": [1.0, 2.0]}, "There are 2 `weights` for 1 judges"),
        ({"judges": [Bright()], "weights": [-1.0]}, "weights is -1.0"),
        ({"judges": [Bright()], "means": [1.0]}, "needs means and deviations: give both"),
        ({"judges": [Bright()], "means": [1.0], "deviations": [0.0]}, "deviations is 0.0"),
        ({"judges": [Bright()], "means": [1.0, 2.0], "deviations": [1.0]}, "one number for each"),
        ({"judges": [Bright()]}, "name pair shards as `measured_on`"),
    ],
)
def test_bad_mixtures(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CalibratedJudges(**arguments)


def test_what_shows_only_when_it_scores(shards: str) -> None:
    with pytest.raises(InputError, match="Broken returned .* 4 of them not finite"):
        WeightedJudges([Bright(), Broken()]).score(IMAGES, TEXTS)

    class Same(Judge):
        def score(self, images: Tensor, *_: Any) -> Tensor:
            return torch.ones(len(images))

    with pytest.raises(InputError, match="A judge has equal scores for all"):
        CalibratedJudges([Same()], measured_on=shards).score(IMAGES, TEXTS)
    with pytest.raises(InputError):
        CalibratedJudges([Bright()], measured_on="nowhere").prepare()


def test_a_metric_is_the_mean_of_all_that_it_was_shown() -> None:
    metric = JudgeMetric(Bright())
    metric.update(IMAGES[:3], TEXTS[:3])
    metric.update(IMAGES[3:], TEXTS[3:])
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)
    metric.reset()
    metric.update(IMAGES[:1].bfloat16(), TEXTS[:1])
    assert metric.compute().item() == -1
    with pytest.raises(InputError, match="Broken returned"):
        JudgeMetric(Broken()).update(IMAGES, TEXTS)


def show_own_share(rank: int, folder: str) -> None:
    """Show the first of two ranks three images and the second one, and write down the mean."""
    place = f"file://{folder}/ranks"
    torch.distributed.init_process_group("gloo", place, rank=rank, world_size=2)
    own = [slice(0, 3), slice(3, 4)][rank]
    metric = JudgeMetric(Bright())
    metric.update(IMAGES[own], TEXTS[own])
    Path(folder, str(rank)).write_text(f"{metric.compute().item()} {metric.count.item()}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_metric_is_the_mean_over_all_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(show_own_share, (str(tmp_path),), nprocs=2)
    for rank, shown in enumerate((3, 1)):
        mean, count = (tmp_path / str(rank)).read_text().split()
        assert float(mean) == pytest.approx(0, abs=1e-6)  # the mean of both means would be 1/3
        assert int(count) == shown  # its own again

"""Which images meet, who is chosen, and what becomes of ties and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_prefopt.datamodules import PairShards
from lit_prefopt.prepare import convert
from lit_prefopt.prepare.form_pairs import Ties
from tests.helpers.shards import picture
from tests.helpers.sources import pair, ranked, samples, write


def labelled(label: float, prompt: str = "a cat") -> dict[str, Any]:
    return {"prompt": prompt, "jpg_0": "1.png", "jpg_1": "2.png", "label_0": label}


def order(folder: Path) -> list[tuple[int, int, float | None]]:
    """Return which picture is chosen, which one rejected, and the label."""
    number = {picture(n): n for n in range(5)}
    return [(number[s.sides[0]], number[s.sides[1]], s.meta.get("label")) for s in samples(folder)]


def test_a_ranking_gives_all_pairs_the_better_side_first(source: Path, tmp_path: Path):
    write(source, ranked(ranking=[2, 1, 4, 3], scores=[5, 9, 1, 2]))
    summary = convert(str(source), str(tmp_path / "out"))
    assert (summary.pairs, summary.ties, summary.images) == (6, 0, 4)
    assert [entry[:2] for entry in order(tmp_path / "out")] == [
        *((1, 0), (1, 3), (1, 2), (0, 3), (0, 2), (3, 2)),
    ]
    assert samples(tmp_path / "out")[0].meta == {
        "gap": 1,
        "ranks": {"chosen": 1, "rejected": 2},
        "scores": {"chosen": 9, "rejected": 5},
    }


def test_scores_alone_best_against_worst(source: Path, tmp_path: Path):
    write(source, ranked(scores=[0.5, 2.0, -1.0, 0.0]))
    convert(str(source), str(tmp_path / "out"), pairs="best-worst")
    assert order(tmp_path / "out") == [(1, 2, None)]
    [sample] = samples(tmp_path / "out")
    assert sample.meta == {"gap": 3.0, "scores": {"chosen": 2.0, "rejected": -1.0}}


def test_a_label_tells_the_better_side(source: Path, tmp_path: Path):
    records = [labelled(1.0), labelled(0.0, "a dog"), labelled(0.7, "a cow")]
    summary = convert(write(source, *records), str(tmp_path / "out"))
    assert order(tmp_path / "out") == [(1, 2, None), (2, 1, None), (1, 2, None)]
    assert summary.ties == 0


def test_ties_are_counted_and_dropped(source: Path, tmp_path: Path):
    write(source, ranked(ranking=[1, 1, 2, 2]), labelled(0.5), labelled(1.0, "a dog"))
    summary = convert(str(source), str(tmp_path / "all"), ties="drop")
    assert (summary.pairs, summary.ties, summary.kept_ties) == (5, 3, 0)
    summary = convert(str(source), str(tmp_path / "two"), ties="drop", pairs="best-worst")
    assert (summary.pairs, summary.ties) == (2, 1)
    with pytest.raises(ValueError, match="has no usable pair: 1 ties"):
        convert(write(source, labelled(0.5)), str(tmp_path / "none"))


@pytest.mark.parametrize("ties", ["keep", "soft"])
def test_ties_are_kept_with_the_label_one_half(source: Path, tmp_path: Path, ties: Ties):
    write(source, ranked(ranking=[1, 1, 2, 3]), labelled(0.5, "a dog"))
    summary = convert(str(source), str(tmp_path / "out"), ties=ties)
    assert (summary.pairs, summary.ties, summary.kept_ties) == (7, 2, 2)
    labels = [label for *_, label in order(tmp_path / "out")]
    assert labels == [0.5, None, None, None, None, None, 0.5]


def test_keep_leaves_probabilities_hard(source: Path, tmp_path: Path):
    convert(write(source, labelled(0.3)), str(tmp_path / "out"), ties="keep")
    assert order(tmp_path / "out") == [(2, 1, None)]


def test_a_kept_tie_the_other_way_round_is_a_duplicate(source: Path, tmp_path: Path):
    turned = labelled(0.5) | {"jpg_0": "2.png", "jpg_1": "1.png"}
    summary = convert(write(source, labelled(0.5), turned), str(tmp_path / "out"), ties="keep")
    assert (summary.pairs, summary.duplicates, summary.opposed) == (1, 1, 0)


def test_soft_takes_a_label_as_probability(source: Path, tmp_path: Path):
    records = [labelled(0.7), labelled(0.2, "a dog"), labelled(1.0, "a cow")]
    convert(write(source, *records), str(tmp_path / "out"), ties="soft")
    assert order(tmp_path / "out") == [(1, 2, 0.7), (2, 1, 0.8), (1, 2, None)]


def test_soft_takes_votes_as_probability(source: Path, tmp_path: Path):
    votes = {"images": ["0.png", "1.png"], "votes": [1, 3], "prompt": "a cat"}
    records = [votes, votes | {"votes": [2, 2], "prompt": "a dog"}]
    # of a pair in known order the larger number is the chosen side's, wherever it stands
    records += [pair(3, 4, "a cow", votes=[2, 8]), pair(3, 4, "a hen", votes=[1.0, 0.0])]
    records += [pair(3, 4, "a fox", votes=None), votes | {"votes": [0, 0], "prompt": "a hare"}]
    summary = convert(write(source, *records), str(tmp_path / "out"), ties="soft")
    assert order(tmp_path / "out") == [
        *((1, 0, 0.75), (0, 1, 0.5), (3, 4, 0.8), (3, 4, None), (3, 4, None), (0, 1, 0.5)),
    ]
    assert summary.ties == 2


def test_soft_takes_opinions_as_probability_and_they_outvote_the_ranking(
    source: Path, tmp_path: Path
):
    opinions = [{"ranking": [1, 2, 3]}, [2, 1, 3], [2, 1, 1], [2, 1, 3]]
    record = {"prompt": "a cat", "images": ["0.png", "1.png", "2.png"], "opinions": opinions}
    write(source, record | {"ranking": [1, 2, 3]})
    convert(str(source), str(tmp_path / "out"), ties="soft")
    # 1 before 0 for three of four; 0 before 2 for three of four; 1 before 2, with half a point
    assert order(tmp_path / "out") == [(1, 0, 0.75), (0, 2, 0.75), (1, 2, 0.875)]
    convert(str(source), str(tmp_path / "hard"))
    assert order(tmp_path / "hard") == [(0, 1, None), (0, 2, None), (1, 2, None)]


def test_training_reads_the_labels(source: Path, tmp_path: Path):
    records = [labelled(0.7), labelled(0.5, "a dog"), labelled(1.0, "a cow")]
    convert(write(source, *records), str(tmp_path / "out"), ties="soft")
    data = PairShards(str(tmp_path / "out"), batch_size=3, resolution=8, workers=0)
    data.setup()
    [batch] = data.train_dataloader()
    labels = dict(zip(batch.texts, batch.labels.tolist(), strict=True))
    assert labels == pytest.approx({"a cat": 0.7, "a dog": 0.5, "a cow": 1.0})

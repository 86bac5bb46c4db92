"""Stages: where each pair goes, what is left out and counted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import split_into_stages
from lit_prefopt.prepare.stages import cut_gaps, cut_ranks
from tests.helpers.shards import picture
from tests.helpers.sources import samples


def pairs(folder: Path, *metas: dict[str, Any], broken: int | None = None) -> str:
    """Write a pair for each .json; a pair's number is in its text and in its images."""
    with ShardWriter(folder, max_count=4) as writer:
        for n, meta in enumerate(metas):
            writer.add(f"pair {n}", picture(100 + n), picture(n), meta, picture(255))
    if broken is not None:
        tar = folder / f"pairs-{broken // 4:06d}.tar"
        content = tar.read_bytes()
        at = content.find(f"{broken:09d}.chosen.png".encode()) + 512
        tar.write_bytes(content[:at] + b"broken" + content[at + 6 :])
    return str(folder)


def scored(*gaps: float) -> list[dict[str, Any]]:
    """Return a .json with scores for each gap."""
    return [{"scores": {"chosen": gap / 2, "rejected": -gap / 2}} for gap in gaps]


def numbers(output: Path) -> list[list[int]]:
    """Return the numbers of the pairs in each stage."""
    folders = sorted(output.glob("stage-*"), key=lambda path: int(path.name[6:]))
    return [[int(sample.text.split()[1]) for sample in samples(folder)] for folder in folders]


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_ranks_are_cut_as_published():
    for images, stages in [(10, 5), (500, 5), (4, 3), (7, 2), (26, 25), (9, 3)]:
        gaps = np.arange(1, images)
        cut = cut_ranks(gaps, np.full(len(gaps), images), stages)
        for gap, stage in zip(gaps.tolist(), (cut + 1).tolist(), strict=True):
            # L_k < gap <= R_k, in whole numbers
            assert (images - 1) * (stages - stage) < gap * stages
            assert gap * stages <= (images - 1) * (stages - stage + 1)


def test_gaps_are_cut_by_count_or_by_size():
    gaps = np.asarray([0.1, 0.9, 1.0, 0.2, 0.2, 0.55])
    assert cut_gaps(gaps, 3, "equal-counts").tolist() == [2, 0, 0, 1, 2, 1]
    # 1.0 to 0.1 in three steps of 0.3: from 0.7, from 0.4, the rest
    assert cut_gaps(gaps, 3, "equal-spacing").tolist() == [2, 0, 0, 2, 2, 1]
    assert cut_gaps(gaps, 1, "equal-spacing").tolist() == [0] * 6


def test_rank_gaps_become_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metas = [{"rank_gap": gap, "images": 10} for gap in (1, 9, 2, 8, 3, 7, 4, 6, 5)]
    metas.append({"rank_gap": 3, "images": 4})  # the largest of its own prompt
    made = split_into_stages(pairs(tmp_path / "in", *metas), str(tmp_path / "out"))
    assert numbers(tmp_path / "out") == [[1, 3, 9], [5, 7], [6, 8], [2, 4], [0]]
    assert made.pairs == [3, 2, 2, 2, 1]
    assert made.gaps[0] == (3, 9)
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (facts["by"], facts["read"], facts["pairs"]) == ("rank", 10, [3, 2, 2, 2, 1])
    assert "stage-1: 3 pairs, gaps of ranks from 3 to 9" in capsys.readouterr().out


def test_what_is_stored_is_copied_to_the_byte_and_twice_alike(tmp_path: Path):
    metas = [{**meta, "source": "é", "label": 0.8} for meta in scored(0.4, 0.1, 0.3)]
    source = pairs(tmp_path / "in", *metas)
    for name in ("a", "b"):
        split_into_stages(source, str(tmp_path / name), stages=2, by="gap")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    before = {sample.text: sample[1:] for sample in samples(source)}
    after = [s for stage in (1, 2) for s in samples(tmp_path / f"a/stage-{stage}")]
    assert {sample.text: sample[1:] for sample in after} == before
    assert len(after) == 3


def test_the_label_wins_and_the_size_of_the_gap_is_the_difficulty(tmp_path: Path):
    source = pairs(tmp_path / "in", *scored(0.1, -0.9, 0.5, 0.0))
    made = split_into_stages(source, str(tmp_path / "out"), stages=2, by="gap")
    assert numbers(tmp_path / "out") == [[1, 2], [0, 3]]
    assert (made.disagreeing, made.swapped, made.even) == (1, 0, 0)
    assert samples(tmp_path / "out/stage-1")[0].sides == [picture(101), picture(1)]


def test_the_reward_wins_and_sides_change_places(tmp_path: Path):
    metas = scored(0.1, -0.9, 0.5, 0.0)
    metas[1] |= {"seeds": [7, 8], "gap": -0.9, "label": 0.6, "weight": 0.5, "rank_gap": -2}
    source = pairs(tmp_path / "in", *metas)
    out = tmp_path / "out"
    made = split_into_stages(source, str(out), stages=2, by="gap", winner="reward")
    assert numbers(out) == [[1, 2], [0]]
    assert (made.disagreeing, made.swapped, made.even) == (1, 1, 1)
    [turned, kept] = samples(out / "stage-1")
    assert turned.sides == [picture(1), picture(101)]
    assert turned.mask == samples(source)[1].mask
    assert turned.meta == {
        "scores": {"chosen": 0.45, "rejected": -0.45},
        "seeds": [8, 7],
        "gap": 0.9,
        "weight": 0.5,
        "rank_gap": 2,
        "swapped": True,
    }
    assert kept.sides == [picture(102), picture(2)]


def test_small_gaps_and_those_beyond_the_most_are_left_out(tmp_path: Path):
    source = pairs(tmp_path / "in", *scored(0.1, 0.4, 0.2, 0.3, -0.3, 0.5))
    made = split_into_stages(source, str(tmp_path / "out"), stages=3, by="gap", least=0.2, most=4)
    # of the two gaps of 0.3 both have room, of those from 0.2 on the smallest has none
    assert numbers(tmp_path / "out") == [[1, 5], [3], [4]]
    assert (made.small, made.surplus, made.read) == (1, 1, 6)


def test_a_gap_serves_where_there_are_no_scores(tmp_path: Path):
    source = pairs(tmp_path / "in", {"gap": 0.5}, {"gap": 2}, {"gap": 1, "scores": {"x": 1}})
    split_into_stages(source, str(tmp_path / "out"), stages=3, by="gap")
    assert numbers(tmp_path / "out") == [[1], [2], [0]]


def test_broken_pairs_are_named_and_left_out(tmp_path: Path):
    source = pairs(tmp_path / "in", *scored(0.1, 0.2, 0.3, 0.4, 0.5), broken=1)
    made = split_into_stages(source, str(tmp_path / "out"), stages=2, by="gap")
    assert numbers(tmp_path / "out") == [[3, 4], [0, 2]]
    assert made.broken.names == [
        "pairs-000000.tar/000000001: chosen is not a png, jpg or webp image"
    ]
    with pytest.raises(InputError, match="Broken: 1 of 5 pairs, more than the 0.0"):
        split_into_stages(source, str(tmp_path / "no"), stages=2, by="gap", broken_share=0.0)


RANKED = {"rank_gap": 1, "images": 4}


@pytest.mark.parametrize("by", ["gap", "rank"])
def test_one_pair_without_a_gap_costs_no_other(tmp_path, by):
    metas = [{"rank_gap": gap, "images": 4, "gap": gap} for gap in (3, 2, 1)] + [{"label": 1.0}]
    made = split_into_stages(pairs(tmp_path / "in", *metas), str(tmp_path / "out"), 3, by)
    assert (made.pairs, made.broken.count) == ([1, 1, 1], 1)
    assert "000000003" in made.broken.names[0]
    assert numbers(tmp_path / "out") == [[0], [1], [2]]


def test_equal_ranks_are_counted_and_left_out(tmp_path, capsys):
    metas = [{"rank_gap": gap, "images": 3} for gap in (0, 1, -0, 2)]
    made = split_into_stages(pairs(tmp_path / "in", *metas), str(tmp_path / "out"), 2)
    assert (made.pairs, made.even, made.broken.count) == ([1, 1], 2, 0)
    assert "2 of two equal ranks" in capsys.readouterr().out


@pytest.mark.parametrize("winner", ["label", "reward"])
@pytest.mark.parametrize(("gaps", "warned"), [((-1, -2, 3), True), ((-1, 2), False), ((1,), False)])
def test_labels_that_disagree_with_most_scores_are_kept_with_a_warning(
    tmp_path, capsys, winner, gaps, warned
):
    source = pairs(tmp_path / "in", *scored(*gaps))
    made = split_into_stages(source, str(tmp_path / "out"), 1, "gap", winner=winner)
    assert (made.pairs, made.disagreeing) == ([len(gaps)], sum(gap < 0 for gap in gaps))
    assert made.swapped == (made.disagreeing if winner == "reward" else 0)
    said = capsys.readouterr().out
    assert ("rejected side in 66.7% of the pairs" in said) == warned


@pytest.mark.parametrize(
    ("metas", "options", "sentence"),
    [
        ([{}], {}, "000000000 has no `rank_gap` and `images` in its .json: generate ranked pairs"),
        ([{"rank_gap": 4, "images": 4}], {}, "rank_gap 4 for 4 images, but it must be less than"),
        ([{"rank_gap": True, "images": 4}], {}, "rank_gap True for 4"),
        ([{"rank_gap": "1", "images": 4}], {}, "rank_gap '1' for 4 images"),
        ([{}], {"by": "gap"}, "neither `scores` of its chosen and rejected side nor a `gap`"),
        ([{"gap": float("nan")}], {"by": "gap"}, "neither `scores`"),
        ([{"gap": 10**400}], {"by": "gap"}, "neither `scores`"),
        (
            [RANKED] * 3,
            {"stages": 2},
            "stage-1 of 2 would be empty; use fewer `--stages` or more images of each prompt",
        ),
        (scored(1, 2), {"by": "gap", "stages": 3}, "stage-3 of 3 would be empty.*more pairs"),
        (scored(1, 1), {"by": "gap", "stages": 2, "cut": "equal-spacing"}, "`--cut equal-counts`"),
        (scored(1, 1), {"by": "gap", "least": 2.0}, "None of 2 pairs is left: 2 .* `--least`"),
        ([], {}, "contain no pair"),
        ([RANKED], {"stages": 0}, "stages is 0"),
        ([RANKED], {"least": -1.0}, "least is -1"),
        ([RANKED], {"most": 0}, "most is 0"),
        ([RANKED], {"broken_share": 2.0}, "broken_share is 2"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_nothing_is_left(tmp_path, metas, options, sentence):
    source = pairs(tmp_path / "in", *metas)
    with pytest.raises(InputError, match=sentence):
        split_into_stages(source, str(tmp_path / "out"), **{"stages": 1, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_and_a_folder_that_is_taken(tmp_path: Path, capsys: Any):
    source = pairs(tmp_path / "in", *[{"rank_gap": gap, "images": 3} for gap in (1, 2)])
    command = ["shards", "stages", "--shards", source, "--output", str(tmp_path / "out")]
    main([*command, "--stages", "2"])
    assert numbers(tmp_path / "out") == [[1], [0]]
    assert "2 of 2 pairs" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="out exists and is not empty; remove it or choose another"
    ):
        main([*command, "--stages", "2"])

"""Conversion to ranked lists and to single images with likes: order, scores, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_prefopt.cli import main
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import Columns, convert, preview, split_into_stages, validate
from tests.helpers.shards import picture
from tests.helpers.sources import pair, ranked, samples, write


def lists(folder: Path) -> list[tuple[list[int], dict]]:
    """Return numbers of the images and metadata of all samples."""
    numbers = {picture(number): number for number in range(20)}
    return [([numbers[side] for side in s.sides], s.meta) for s in samples(folder)]


def table(folder: Path, text: str) -> str:
    """Write a CSV file beside the images, and return its path."""
    (folder / "table.csv").write_text(text)
    return str(folder / "table.csv")


def test_ranks_become_an_order_and_win_rates(source: Path, tmp_path: Path):
    gaps = ranked(ranking=[7, 1, 7, 2])  # a gap, and a tie of the worst
    summary = convert(write(source, gaps), str(tmp_path / "out"), samples="lists")
    [(order, meta)] = lists(tmp_path / "out")
    assert order == [1, 3, 0, 2]
    assert meta["ranks"] == [1, 2, 7, 7]
    assert meta["scores"] == [1.0, 0.666667, 0.166667, 0.166667]  # a tie is half a win
    assert meta["gap"] == pytest.approx(0.833333)
    assert (summary.pairs, dict(summary.lengths), summary.ties) == (1, {4: 1}, 0)


def test_scores_of_the_source_are_kept_and_ranks_decide_the_order(source: Path, tmp_path: Path):
    record = ranked(ranking=[1, 2, 3, 4], scores=[0.5, 0.9, 0.1, -3])
    convert(
        write(source, record, ranked(scores=[1, 4, 2, 3])), str(tmp_path / "o"), samples="lists"
    )
    by_rank, by_score = lists(tmp_path / "o")
    assert by_rank[0] == [0, 1, 2, 3]
    assert by_rank[1]["scores"] == [0.5, 0.9, 0.1, -3]
    assert by_score[0] == [1, 3, 2, 0]
    assert by_score[1]["scores"] == [4, 3, 2, 1]


def test_annotators_opinions_become_win_rates(source: Path, tmp_path: Path):
    record = {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "ranking": [1, 2, 3]}
    record["opinions"] = [[1, 2, 3], [2, 1, 3]]
    convert(write(source, record), str(tmp_path / "out"), samples="lists")
    assert lists(tmp_path / "out")[0][1]["scores"] == [0.75, 0.75, 0.0]


def test_columns_in_the_order_of_ranks(source: Path, tmp_path: Path):
    text = "prompt,first,second,third\na cat,4.png,2.png,3.png\na dog,1.png,,0.png\n"
    columns = Columns(ranked=["first", "second", "third"])
    convert(table(tmp_path, text), str(tmp_path / "out"), columns=columns, samples="lists")
    assert [order for order, _ in lists(tmp_path / "out")] == [[4, 2, 3], [1, 0]]
    text = "prompt,rank1,rank2,rank3\na cat,4.png,2.png,3.png\n"
    convert(table(tmp_path, text), str(tmp_path / "own"), samples="lists")
    assert lists(tmp_path / "own")[0][0] == [4, 2, 3]
    # the shards themselves are such a source, and also one of pairs
    tars = str(tmp_path / "own")
    convert(tars, str(tmp_path / "again"), samples="lists")
    assert lists(tmp_path / "again") == lists(tmp_path / "own")
    assert convert(tars, str(tmp_path / "pairs")).pairs == 3


def test_an_image_per_row_and_parquet(source: Path, tmp_path: Path):
    text = "prompt,image,rank\na cat,1.png,2\na dog,4.png,1\na cat,2.png,1\na cat,3.png,3\n"
    text += "a dog,0.png,2\n"
    convert(table(tmp_path, text), str(tmp_path / "rows"), samples="lists")
    assert [order for order, _ in lists(tmp_path / "rows")] == [[2, 1, 3], [4, 0]]
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"prompt": ["a cat"], "rank1": [picture(3)], "rank2": [picture(1)]}
    parquet.write_table(arrow.table(columns | {"rank3": [picture(2)]}), tmp_path / "a.parquet")
    convert(str(tmp_path / "a.parquet"), str(tmp_path / "table"), samples="lists")
    assert lists(tmp_path / "table")[0][0] == [3, 1, 2]


def test_lists_of_one_length(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    records = [
        {"prompt": "a", "images": [f"{n}.png" for n in range(5)], "scores": [5, 4, 3, 2, 1]},
        {"prompt": "b", "images": ["0.png", "1.png", "2.png"], "scores": [1, 2, 3]},
        {"prompt": "c", "images": ["0.png", "1.png"], "scores": [1, 2]},
    ]
    free = convert(write(source, *records), str(tmp_path / "free"), samples="lists")
    assert dict(free.lengths) == {5: 1, 3: 1, 2: 1}
    printed = capsys.readouterr().out
    assert "3 ranked lists from 3 records" in printed
    assert "images in a list: 1 of 2, 1 of 3, 1 of 5" in printed
    assert "methods of lists need one length: convert again with `--list_size 2`" in printed
    same = convert(str(source), str(tmp_path / "same"), samples="lists", list_size=3)
    assert [order for order, _ in lists(tmp_path / "same")] == [[0, 2, 4], [2, 1, 0]]
    assert lists(tmp_path / "same")[0][1]["scores"] == [5, 3, 1]
    assert same.short == 1
    metadata = json.loads((tmp_path / "same" / "summary.json").read_text())
    assert metadata["lists_by_length"] == {"3": 2}
    assert metadata["shorter_lists"] == 1
    with pytest.raises(InputError, match="has no usable list: 3 lists shorter than `list_size`"):
        convert(str(source), str(tmp_path / "none"), samples="lists", list_size=6)


def test_what_a_list_loses(source: Path, tmp_path: Path):
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "copy.png").write_bytes(picture(1))
    records = [
        ranked(scores=[1, 2, 3, 4]),  # without its broken image
        ranked(scores=[1, 1, 1, 1], prompt="all alike"),
        {"prompt": "twice", "images": ["0.png", "1.png", "copy.png"], "scores": [1, 2, 3]},
        ranked(scores=[1, 2, 3, 4]),
        {"prompt": "broken", "images": ["0.png", "2.png"], "scores": [1, 2]},
    ]
    summary = convert(write(source, *records), str(tmp_path / "out"), samples="lists")
    assert [order for order, _ in lists(tmp_path / "out")] == [[3, 1, 0]]
    assert (summary.ties, summary.identical, summary.duplicates) == (1, 1, 1)
    kept = convert(str(source), str(tmp_path / "kept"), samples="lists", ties="keep")
    assert (kept.pairs, kept.kept_ties) == (2, 1)
    assert lists(tmp_path / "kept")[1][1]["scores"] == [1, 1, 1]


LISTS = "lists"
LIKES = """prompt,image,label,score
a cat,0.png,1,0.5
a cat,1.png,0,-2
a cat,2.png,,
a dog,0.png,TRUE,1
a dog,3.png,dislike,2
a cat,0.png,1,0.5
a cat,0.png,0,0.5
the sea,4.png,exclusive_win,3
"""


def test_likes_and_dislikes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    summary = convert(table(tmp_path, LIKES), str(tmp_path / "out"), samples="likes")
    stored = [(order, meta["label"], meta["scores"]) for order, meta in lists(tmp_path / "out")]
    assert stored == [
        ([0], 1, [0.5]),
        ([1], 0, [-2]),
        ([0], 1, [1]),
        ([3], 0, [2]),
        ([0], 0, [0.5]),  # another annotator's view
        ([4], 1, [3]),
    ]
    assert (summary.pairs, summary.liked, summary.unlabelled) == (6, 3, 1)
    assert (summary.duplicates, summary.opposed) == (1, 1)
    printed = capsys.readouterr().out
    assert "6 single images from 8 records" in printed
    assert "3 liked, 3 disliked" in printed
    assert [shard.side_counts for shard in read_index(tmp_path / "out")] == [{1}]
    again = convert(str(tmp_path / "out"), str(tmp_path / "again"), samples="likes")
    assert lists(tmp_path / "again") == lists(tmp_path / "out")
    assert again.duplicates == 0


def test_prompts_are_held_out_of_lists_and_likes(source: Path, tmp_path: Path):
    source_of_likes = table(tmp_path, LIKES)
    summary = convert(source_of_likes, str(tmp_path / "out"), samples="likes", hold_out=0.3)
    texts = [{s.text for s in samples(tmp_path / "out" / n)} for n in ("train", "validation")]
    assert texts[0] | texts[1] == {"a cat", "a dog", "the sea"}
    assert not texts[0] & texts[1]
    assert summary.held_out_prompts == 1


def test_the_cure_is_named_where_likes_are_read_as_rankings(source: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"no number under 'ranking' .* by `--samples likes`"):
        convert(table(tmp_path, "prompt,image,label\na,0.png,1\nb,1.png,0\n"), str(tmp_path / "o"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("-1 1", r"has the label -1, which is neither 1 \(liked\) nor 0 .*write 1 where the image"),
        ("0.5 1", "has the label 0.5, which is neither 1"),
        ("good bad", r"has no usable image: 2 broken; .*has the label 'good', which is neither 1"),
    ],
)
def test_other_labels_than_likes_are_refused(
    source: Path, tmp_path: Path, labels: str, message: str
):
    first, second = labels.split()
    text = "prompt,image,label\n" + f"a,0.png,{first}\nb,1.png,{second}\n"
    with pytest.raises(InputError, match=message):
        convert(table(tmp_path, text), str(tmp_path / "out"), samples="likes")
    assert not (tmp_path / "out").exists()


def test_records_of_another_kind_are_broken(source: Path, tmp_path: Path):
    records = [pair(), {"prompt": "a", "image": "3.png", "label": 1}]
    summary = convert(write(source, *records), str(tmp_path / "out"), samples="likes")
    assert summary.pairs == 1
    assert summary.broken.names == [f"{source}, line 1 is a pair or a list, and no single image "
                                    "with a label"]  # fmt: skip
    with pytest.raises(InputError, match="`list_size` is the length of lists, not of pairs"):
        convert(str(source), str(tmp_path / "no"), list_size=4)


def test_validation_counts_kinds_and_finds_missing_labels_and_scores(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    convert(table(tmp_path, LIKES), str(tmp_path / "likes"), samples="likes")
    report = validate(str(tmp_path / "likes"))
    assert (report.would_stop, report.sides, report.liked) == (False, {1: 6}, 3)
    assert "3 liked, 3 disliked" in capsys.readouterr().out
    from lit_prefopt.data.shards.writer import ShardWriter

    with ShardWriter(tmp_path / "mixed") as writer:
        writer.add_sides("a", [picture(1), picture(2), picture(3)], {"scores": [3, 2, 1]})
        writer.add_sides("b", [picture(1), picture(2), picture(3), picture(4)])
        writer.add_sides("c", [picture(1)], {"label": 0.5})
        writer.add_sides("d", [picture(1)])
    report = validate(str(tmp_path / "mixed"), broken_share=1.0)
    assert report.broken.count == 2
    assert "is a single image without the label 1 (liked) or 0" in report.broken.names[0]
    assert report.unscored.names == ["pairs-000000.tar/000000001"]
    assert report.sides == {3: 1, 4: 1}
    assert report.odd.count == 0
    printed = capsys.readouterr().out
    assert "ranked lists" in printed
    assert "different numbers of images" in printed


def test_stages_are_of_pairs(source: Path, tmp_path: Path):
    convert(write(source, ranked(scores=[1, 2, 3, 4])), str(tmp_path / "lists"), samples="lists")
    with pytest.raises(InputError, match="has lists of 4 where pairs are needed"):
        split_into_stages(str(tmp_path / "lists"), str(tmp_path / "stages"))


def test_the_contact_sheet_shows_every_image(source: Path, tmp_path: Path):
    from lit_prefopt.prepare.preview import EDGE, GAP, LINE, TILE

    convert(write(source, ranked(scores=[1, 2, 3, 4])), str(tmp_path / "lists"), samples="lists")
    preview(str(tmp_path / "lists"), str(tmp_path / "lists.png"))
    sheet = Image.open(tmp_path / "lists.png")
    assert sheet.width == 4 * TILE + 3 * GAP + 2 * EDGE + 2 * GAP
    top = GAP + EDGE + LINE + TILE // 2
    # the left half of each picture is as bright as its number
    shown = [sheet.getpixel((GAP + EDGE + n * (TILE + GAP) + TILE // 8, top)) for n in range(4)]
    assert shown == [(3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)]
    convert(table(tmp_path, LIKES), str(tmp_path / "likes"), samples="likes")
    arguments = ["--shards", str(tmp_path / "likes"), "--output", str(tmp_path / "likes.png")]
    main(["shards", "preview", *arguments])
    assert Image.open(tmp_path / "likes.png").width > sheet.width  # three cards beside each other

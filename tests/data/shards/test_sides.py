"""Samples of any number of images: single ones, pairs and ranked lists in one format of shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.shards.find import find_pairs
from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.sides import (
    described,
    names_in,
    scores_in,
    seeds_in,
    side_counts,
    spread,
)
from lit_prefopt.data.shards.tar import split_name
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from tests.helpers.shards import edited, picture, plain_tar


def written(folder: Path, *counts: int, per_shard: int = 10) -> str:
    """Write samples with these numbers of images; side s of sample n is the picture 10 n + s."""
    with ShardWriter(folder, max_count=per_shard) as writer:
        for number, count in enumerate(counts):
            images = [picture(10 * number + side) for side in range(count)]
            meta = {"label": number % 2} if count == 1 else {"scores": [*range(count, 0, -1)]}
            writer.add_sides(f"prompt {number}", images, meta)
    return str(folder)


def rows(folder: str) -> list[dict]:
    """Return the rows of an index as they are stored."""
    return json.loads((Path(folder) / "index.json").read_text())["shards"]


@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 4, 4), (3, 9, 12), (2, 5)])
def test_what_is_written_is_read_and_indexed_alike(tmp_path: Path, counts: tuple[int, ...]):
    folder = written(tmp_path / "shards", *counts)
    index = (tmp_path / "shards" / "index.json").read_bytes()
    index_shards(folder)
    assert (tmp_path / "shards" / "index.json").read_bytes() == index
    [shard] = read_index(folder)
    assert [shard.count_of(number) for number in range(len(counts))] == [*counts]
    assert side_counts([shard]) == set(counts)
    for number, count in enumerate(counts):
        sample = ShardReader([shard])(0, number)
        assert sample.sides == [picture(10 * number + side) for side in range(count)]
        assert (sample.text, sample.side_count) == (f"prompt {number}", count)


def test_pairs_have_the_members_and_the_index_that_they_had(tmp_path: Path):
    for name, add in (("as pairs", "add"), ("as sides", "add_sides")):
        with ShardWriter(tmp_path / name) as writer:
            images = picture(1), picture(2)
            getattr(writer, add)("a cat", *(images if add == "add" else [images]))
    one, other = ((tmp_path / name / "pairs-000000.tar") for name in ("as pairs", "as sides"))
    assert one.read_bytes() == other.read_bytes()
    [row] = rows(str(tmp_path / "as sides"))
    assert set(row) == {"name", "size", "offsets", "sizes"}  # as before there were other samples


def test_the_index_names_one_number_where_all_have_the_same(tmp_path: Path):
    assert rows(written(tmp_path / "a", 4, 4))[0]["sides"] == 4
    assert rows(written(tmp_path / "b", 1, 1))[0]["sides"] == 1
    assert rows(written(tmp_path / "c", 3, 4))[0]["sides"] == [3, 4]


@pytest.mark.parametrize("sides", [0, 100, -(10**30), "4", [4], [4, 0], [4, 5.5], 4.0])
def test_wrong_numbers_in_an_index_are_refused(tmp_path: Path, sides: object):
    folder = written(tmp_path / "shards", 4, 4)
    edited(folder, lambda index: index["shards"][0].update(sides=sides))
    with pytest.raises(InputError, match="has numbers of sides that do not fit pairs-000000.tar"):
        read_index(folder)


def test_a_tar_by_hand_is_indexed(tmp_path: Path):
    members = [
        ("a.txt", b"one"),
        ("a.rank2.webp", picture(2, form="WEBP")),
        ("a.rank1.JPG", picture(1, (20, 30), "JPEG")),
        ("a.rank10.png", picture(10)),
        *[(f"a.rank{number}.png", picture(number)) for number in range(3, 10)],
        ("b.image.png", picture(20)),
        ("b.txt", b"two"),
        ("b.json", b'{"label": 0}'),
        ("c.rank1.png", picture(1)),
        ("c.txt", b"three"),
    ]
    plain_tar(tmp_path / "theirs.tar", members)
    index_shards(str(tmp_path))
    [shard] = read_index(tmp_path)
    assert shard.sides is not None
    assert shard.sides.tolist() == [10, 1, 2]
    assert shard.sizes is not None
    assert shard.sizes.tolist() == [[20, 30], [12, 10], [12, 10]]  # of the best image
    reader = ShardReader([shard])
    assert reader(0, 0).sides[9] == picture(10)
    assert (reader(0, 1).names, reader(0, 1).meta) == (("image",), {"label": 0})
    with pytest.raises(BrokenSample, match="theirs.tar/c has no rank2 image"):
        reader(0, 2)


def test_a_pair_with_further_images_stays_a_pair():
    assert names_in(["chosen.jpg", "rejected.jpg", "rank1.jpg", "image.png"])[0] == "chosen"
    assert names_in(["txt", "json", "mask.png"]) == ("chosen", "rejected")
    assert split_name("a.rank1.jpg") == ("a", "rank1.jpg")


def test_the_best_and_the_worst_are_a_pair_with_their_own_numbers(tmp_path: Path):
    reader = ShardReader(read_index(written(tmp_path / "shards", 4)))
    reader.pairs_only = True
    sample = reader(0, 0)
    assert sample.sides == [picture(0), picture(3)]
    assert sample.names == ("rank1", "rank4")
    assert scores_in(sample.meta, 2) == [4.0, 1.0]


def test_what_a_method_needs_is_missing_in_a_broken_sample(tmp_path: Path):
    reader = ShardReader(read_index(written(tmp_path / "shards", 3)))
    reader.required = ("scores",)
    assert reader(0, 0).side_count == 3
    reader.required = ("scores", "noise_seeds")
    with pytest.raises(BrokenSample, match="000000000 has no noise_seeds of all its images"):
        reader(0, 0)


def test_numbers_of_each_side_are_known_of_all_or_of_none():
    pair = {"scores": {"rejected": 0.25, "chosen": 2}, "seeds": [None, 7]}
    assert scores_in(pair, 2) == [2.0, 0.25]
    assert seeds_in(pair, 2) is None  # a real image has no seed
    assert seeds_in({"seeds": [2**63 - 1, -5]}, 2) == [2**63 - 1, -5]
    assert seeds_in({"seeds": [2**63, 1]}, 2) is None
    for scores in (
        [1, 2],
        {"chosen": 1, "rejected": 2},
        [1, 2, "3"],
        [1, 2, float("nan")],
        5,
        None,
    ):
        assert scores_in({"scores": scores}, 3) is None
    assert scores_in({}, 3) is None
    assert scores_in({"scores": [0.5]}, 1) == [0.5]


def test_a_shorter_list_has_the_best_the_worst_and_even_steps():
    assert spread(9, 3) == [0, 4, 8]
    assert spread(9, 2) == [0, 8]
    assert spread(4, 4) == [0, 1, 2, 3]
    for ranked in range(2, 12):
        for count in range(2, ranked + 1):
            taken = spread(ranked, count)
            assert (taken[0], taken[-1]) == (0, ranked - 1)
            assert len(set(taken)) == count
            assert taken == sorted(taken)


def test_kinds_are_described():
    assert described({2}) == "pairs"
    assert described({1, 2}) == "single images and pairs"
    assert described({4}) == "lists of 4"
    assert described({2, 3, 9}) == "pairs and lists of 3 to 9"


def test_where_pairs_are_needed_other_samples_are_refused(tmp_path: Path):
    assert len(find_pairs(written(tmp_path / "a", 2, 2))) == 1
    with pytest.raises(InputError, match="has lists of 4 where pairs are needed"):
        find_pairs(written(tmp_path / "b", 4))


@pytest.mark.parametrize("count", [0, 100])
def test_no_image_or_too_many_are_refused(tmp_path: Path, count: int):
    with (
        pytest.raises(InputError, match=f"Sample 0 has {count} images; give 1 to 99"),
        ShardWriter(tmp_path / "out") as writer,
    ):
        writer.add_sides("a cat", [picture(1)] * count)
    assert not (tmp_path / "out").exists()

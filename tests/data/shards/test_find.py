"""Patterns: which shards they name, and a sentence where they name none."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import data
from tests.helpers.server import serving


@pytest.fixture
def folders(make_shards) -> Path:
    """Return a folder with the folders a, b and c of 4, 5 and 6 pairs, 3 in a shard."""
    for name, samples in (("a", 4), ("b", 5), ("c", 6)):
        folder = make_shards(samples, per_shard=3, name=name)
    return Path(folder).parent


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        ("{a,b}", [3, 1, 3, 2]),
        ("{b,a}", [3, 2, 3, 1]),
        ("{a..c}", [3, 1, 3, 2, 3, 3]),
        ("*", [3, 1, 3, 2, 3, 3]),
        ("c/", [3, 3]),
        ("{a,c}/pairs-00000{0..1}.tar", [3, 1, 3, 3]),
        ("c/pairs-000001.tar", [3]),
        ("{a,a/,a/pairs-000000.tar}", [3, 1]),
        ("{a/pairs-000000.tar,a}", [3, 1]),
        ("a/pairs-00000{0,0}.tar", [3]),
    ],
)
def test_patterns_name_folders_or_shards(folders: Path, pattern: str, counts: list[int]):
    found = find_shards(f"{folders}/{pattern}")
    assert [len(shard.offsets) for shard in found] == counts


def test_lists_of_patterns_follow_each_other(folders: Path):
    found = find_shards([f"{folders}/c", f"{folders}/{{a,b}}"])
    assert [Path(shard.folder).name for shard in found] == list("ccaabb")
    module = data([f"{folders}/c", f"{folders}/{{a,b}}"], batch_size=15)
    [batch] = module.train_dataloader()
    assert len(set(batch.texts)) == 6  # the three folders count from 0 each
    assert module.train_dataloader().batches.plan.samples == 15


def test_patterns_of_urls(folders: Path):
    with serving(str(folders)) as server:
        found = find_shards(f"{server.url}/{{a,c}}/pairs-00000{{0..1}}.tar")
        assert [len(shard.offsets) for shard in found] == [3, 1, 3, 3]
        assert found[0].url == f"{server.url}/a/pairs-000000.tar"
        with pytest.raises(InputError, match="matches nothing; check it, or use a range"):
            find_shards(f"{server.url}/*")
    memory = fsspec.filesystem("memory")
    memory.put(str(folders), "/patterns", recursive=True)
    assert [len(s.offsets) for s in find_shards("memory://patterns/*")] == [3, 1, 3, 2, 3, 3]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x*", "matches nothing; check it"),
        ("{x,y}", r"There is no folder .*x; check the path"),
        ("{a,y}", r"There is no folder .*y; check the path"),
        ("{a", "has unbalanced braces; write {000..009} or {a,b}"),
        ("a/pairs-{000000..000002}.tar", "has no pairs-000002.tar in its index; check the pattern"),
        ("a/pairs-000000.tar/", "has no pairs|There is no folder"),
        ("{0..999999999}.tar", "names more than 100000 files; use a shorter range"),
        ("{0..999999999999999999}.tar", "names more than 100000 files"),
        ("{0..9}{0..9}" * 4, "names more than 100000 files"),
    ],
)
def test_what_matches_nothing_is_said(folders: Path, pattern: str, message: str):
    with pytest.raises(InputError, match=message):
        find_shards(f"{folders}/{pattern}")


def test_no_shards_at_all_are_said():
    with pytest.raises(InputError, match="No shards are given; give a folder or a URL"):
        find_shards([])


def test_a_folder_whose_name_holds_braces_is_taken_as_it_is(make_shards):
    assert len(find_shards(make_shards(4, name="{a,b}*"))) == 1

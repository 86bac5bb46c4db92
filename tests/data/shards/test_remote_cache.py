"""Remote shards: from a server that fails in all ways, fetched once, within a bound."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.data.shards.remote_cache import ShardCache, default_folder
from lit_prefopt.datamodules import PairShards
from lit_prefopt.errors import InputError
from lit_prefopt.utils import filesystem as files
from lit_prefopt.utils.filesystem import filesystem
from tests.helpers.pair_data import data, equal, sentence, train
from tests.helpers.server import Server, serving

FIRST = "pairs-000000.tar"


@pytest.fixture
def server(make_shards) -> Iterator[Server]:
    """Serve 20 pairs in 4 shards."""
    with serving(make_shards()) as server:
        yield server


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files of a cache."""
    return sum(path.stat().st_size for path in folder.iterdir())


def only_whole_shards(folder: Path, server: Server) -> bool:
    """Return whether a cache holds whole shards and empty locks, nothing else."""
    whole = {path.read_bytes() for path in server.folder.glob("*.tar")}
    rest = [path for path in folder.iterdir() if path.suffix != ".lock"]
    return all(path.suffix == ".tar" and path.read_bytes() in whole for path in rest)


def test_a_run_on_remote_shards_is_that_on_local_ones(server: Server, cache_folder: Path):
    local = list(data(str(server.folder), crop="random").train_dataloader())
    remote = data(server.url, crop="random", workers=2, validation=server.url)
    loader = remote.train_dataloader()
    for batches in (list(loader), list(data(server.url, crop="random").train_dataloader())):
        assert all(equal(*both) for both in zip(local, batches, strict=True))
    assert len(list(loader)) == 5  # a second epoch
    assert len(list(remote.val_dataloader())) == 5
    # at once, although workers were forked while this process had asked the server before
    assert server.served["index.json"] == 3
    # by two workers of training, two of validation and this process
    assert {n: server.served[n] for n in server.served if n.endswith("tar")} == {
        f"pairs-{n:06d}.tar": 1 for n in range(4)
    }
    assert only_whole_shards(cache_folder, server)


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        *[("index.json", faults) for faults in ([500, 500], ["drop"], ["long"], ["stall"])],
        *[(FIRST, faults) for faults in ([500, 500], ["drop"], ["long"], ["stall"])],
        *[(FIRST, ["short"]), (FIRST, ["hasty"]), (FIRST, ["endless"])],
        (FIRST, [503, "drop", 429, "long"]),
    ],
)
def test_what_fails_for_a_while_is_fetched_again(server, cache_folder, monkeypatch, faults, name):
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    server.faults[name] = list(faults)
    assert ShardReader(read_index(server.url))(0, 2).text == "prompt 2"
    assert server.served[name] == len(faults) + 1
    assert only_whole_shards(cache_folder, server)


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (500, "500.*; attempt 4.; check the address and the connection", 4),
        ("drop", "attempt 4.; check", 4),
        ("stall", "(?i)timeout.*attempt 4.; check", 4),
        ("hasty", "attempt [234].; check", None),  # what aiohttp makes of it depends on the moment
        ("short", "attempt [234].; check", None),
        ("endless", "bytes instead of .*cut short.*has changed.*shards index.*attempt 2", 2),
        (403, "403.*attempt 1.; check", 1),
        (404, "is missing; copy it there, or make the index again", 1),
    ],
)
def test_what_fails_for_ever_ends_in_a_sentence(
    server, cache_folder, monkeypatch, fault, message, requests
):
    monkeypatch.setattr(files, "TIMEOUT", 0.1)
    monkeypatch.setattr(files, "ATTEMPTS", 4)
    server.faults[FIRST] = [fault] * 20
    reader = ShardReader(read_index(server.url))
    with pytest.raises(InputError, match=message) as caught:
        reader(0, 2)
    assert "\n" not in str(caught.value)
    assert server.served[FIRST] == requests or not requests
    assert only_whole_shards(cache_folder, server)
    assert reader(1, 0).text == "prompt 6"


def test_the_sentence_comes_out_of_a_worker(server: Server):
    server.faults[FIRST] = [404] * 20
    assert f"{FIRST} is missing" in sentence(data(server.url, workers=2))


def test_a_remote_index_that_is_missing_or_out_of_reach_is_said(server: Server, monkeypatch):
    with pytest.raises(InputError, match=r"has no index\.json; make it with"):
        read_index(f"{server.url}/nowhere")
    monkeypatch.setattr(files, "ATTEMPTS", 2)
    with pytest.raises(InputError, match="cannot be fetched .*attempt 2.; check the address"):
        read_index("http://127.0.0.1:9/pairs")


def test_a_shard_that_changed_since_the_index_is_refused(server: Server, cache_folder: Path):
    reader = ShardReader(read_index(server.url))
    shard = server.folder / FIRST
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(
        InputError, match="or the shard has changed and needs `lit-prefopt shards index"
    ):
        reader(0, 0)
    assert only_whole_shards(cache_folder, server)


def test_after_a_new_index_the_old_content_is_not_taken(server: Server, make_shards):
    assert ShardReader(read_index(server.url))(0, 0).text == "prompt 0"
    other = Path(make_shards(19, per_shard=5, name="other"))
    for path in other.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    reader = ShardReader(read_index(server.url))
    assert [reader(0, n).text for n in range(5)] == [f"prompt {n}" for n in range(5)]
    assert server.served[FIRST] == 2


def test_the_cache_stays_below_its_bound_and_open_shards_readable(server, cache_folder):
    shards = read_index(server.url)
    limit = 2 * max(shard.size for shard in shards)
    cache = ShardCache(limit=limit)
    reader = ShardReader(shards, cache=cache)
    opened = [cache.open(shard) for shard in shards]
    assert bytes_in(cache_folder) <= limit
    assert len(list(cache_folder.glob("*.tar"))) == 2
    for shard, file in zip(shards, opened, strict=True):  # the first ones were removed
        assert file.read() == (server.folder / shard.name).read_bytes()
        file.close()
    for shard in (0, 1, 2, 0, 3, 0, 1):
        reader(shard, 0)
        assert bytes_in(cache_folder) <= limit


def test_the_shard_opened_longest_ago_makes_room(server: Server, cache_folder: Path):
    shards = read_index(server.url)
    cache = ShardCache(limit=shards[0].size + shards[1].size)
    for shard in (0, 1, 0, 3):
        cache.open(shards[shard]).close()
        time.sleep(0.01)
    cache.open(shards[0]).close()
    assert server.served[FIRST] == 1


def test_a_removed_shard_gives_the_disk_its_room_back(server: Server):
    shards = read_index(server.url)
    reader = ShardReader(shards, cache=ShardCache(limit=shards[0].size))
    for shard in range(4):
        reader(shard, 0)
        links = [os.fstat(file.fileno()).st_nlink for file in reader._files.values.values()]
        assert links.count(0) <= 1


def read_all(url: str, limit: int, start: int) -> list[str]:
    """Read one sample of each shard, as one process of many does."""
    shards = read_index(url)
    reader = ShardReader(shards, cache=ShardCache(limit=limit))
    return [reader((start + n) % 4, 0).text for n in range(4)]


@pytest.mark.parametrize("room", [4, 2, 1])
def test_many_processes_fetch_a_shard_once_and_share_the_room(server, cache_folder, room):
    server.pause = 0.05
    limit = room * max(shard.size for shard in read_index(server.url))
    most = 0
    # other tests may have left handlers that a pool's end by SIGTERM would not get past
    plain = {"initializer": signal.signal, "initargs": (signal.SIGTERM, signal.SIG_DFL)}
    with multiprocessing.get_context("fork").Pool(4, **plain) as pool:
        runs = [pool.apply_async(read_all, (server.url, limit, n)) for n in range(4)]
        while not all(run.ready() for run in runs):
            if (cache_folder / "cache.lock").exists():
                with FileLock(cache_folder / "cache.lock"):  # nobody makes room meanwhile
                    most = max(most, sum(map(_size, cache_folder.glob("*.*"))))
            time.sleep(0.002)
        texts = [run.get() for run in runs]
    expected = [f"prompt {6 * n}" for n in range(4)]
    assert [sorted(read) for read in texts] == [sorted(expected)] * 4
    assert 0 < most <= limit
    assert only_whole_shards(cache_folder, server)
    if room == 4:
        assert all(server.served[f"pairs-{n:06d}.tar"] == 1 for n in range(4))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # given its name meanwhile
        return 0


def test_what_a_killed_process_left_is_removed(server: Server, cache_folder: Path):
    shards = read_index(server.url)
    cache_folder.mkdir(parents=True)
    (cache_folder / "0123.100000.part").write_bytes(b"half")
    (cache_folder / "4567.100000.part").write_bytes(b"on its way")
    with FileLock(cache_folder / "4567.lock"):
        limit = 100_000 + shards[0].size
        with ThreadPoolExecutor(1) as pool:  # in a thread of its own, as another process
            pool.submit(lambda: ShardCache(limit=limit).open(shards[0]).close()).result(10)
    assert [path.name for path in cache_folder.glob("*.part")] == ["4567.100000.part"]
    assert bytes_in(cache_folder) < limit


def test_a_damaged_file_of_the_cache_is_fetched_again(server: Server, cache_folder: Path):
    shards = read_index(server.url)
    ShardCache().open(shards[0]).close()
    [kept] = cache_folder.glob("*.tar")
    kept.write_bytes(kept.read_bytes()[:500])
    assert ShardReader(shards)(0, 0).text == "prompt 0"


def test_too_small_a_cache_is_told_at_the_start(server: Server):
    with pytest.raises(InputError, match="two blocks have .* raise `cache_size`, or lower `shards"):
        data(server.url, cache_size=30_000)
    data(server.url, cache_size=45_000, shards_per_block=1)
    data(str(server.folder), cache_size=0)  # of local shards nothing is kept
    with pytest.raises(InputError, match="more than the 10 of the cache; raise `cache_size`"):
        ShardCache(limit=10).open(read_index(server.url)[0])


def test_a_cache_that_cannot_be_made_or_written_is_said(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="cannot be created .*; choose another folder with `cache`"
    ):
        data(
            server.url, cache=str(tmp_path / "file" / "x")
        ).train_dataloader().batches.loader.reader(0, 0)


def test_a_full_disk_is_not_asked_again(server: Server, cache_folder: Path):
    shards = read_index(server.url)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # no file may become larger
    try:
        with pytest.raises(InputError, match=r"File too large.*attempt 1"):
            ShardCache().open(shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert only_whole_shards(cache_folder, server)


def test_the_folder_of_the_cache(monkeypatch, tmp_path: Path):
    assert default_folder() == tmp_path / ".cache" / "lit-prefopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "lit-prefopt"
    assert ShardCache("~/mine").folder == tmp_path / "mine"


def test_a_run_resumes_on_remote_shards(server: Server, tmp_path: Path):
    whole = train(data(server.url), tmp_path / "a", accumulate_grad_batches=1)
    module = data(server.url, workers=1)
    resumed = train(module, tmp_path / "b", tmp_path / "a/step=7.ckpt", accumulate_grad_batches=1)
    assert all(equal(a[1], b[1]) for a, b in zip(resumed.seen, whole.seen[7:], strict=True))


def test_s3_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"needs s3fs; install it .*lit-prefopt\[s3\]"):
        PairShards("s3://bucket/pairs", 4, resolution=8).setup("fit")


def test_the_hub_is_a_file_system_like_any_other():
    fs, path = filesystem("hf://datasets/somebody/pairs/train")
    assert type(fs).__name__ == "HfFileSystem"
    assert path == "datasets/somebody/pairs/train"

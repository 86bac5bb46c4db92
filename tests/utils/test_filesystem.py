"""Whole files: bounded in size and time, and regular ones only."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.shards.index import read_index, scan_shard
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.errors import InputError
from lit_prefopt.prompts.readers import read_prompts
from lit_prefopt.utils import filesystem as files
from lit_prefopt.utils.filesystem import read_whole
from tests.helpers.server import serving
from tests.helpers.shards import cache_folder, make_shards

__all__ = ["cache_folder", "make_shards"]


@pytest.fixture
def trickle() -> Iterator[str]:
    """Serve a body of one byte every 20 ms, without an end."""
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def respond(connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            while not ended.wait(0.02):
                connection.sendall(b"a")
        except OSError:
            connection.close()

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=respond, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    ended.set()
    server.close()


def test_a_trickle_ends_in_a_sentence(trickle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    start = time.monotonic()
    for read in (read_whole, read_prompts):
        with pytest.raises(InputError, match=r"only \d+ bytes in 0 seconds; attempt 2"):
            read(f"{trickle}/a.txt")
    with pytest.raises(InputError, match=r"index.json cannot be fetched \(only"):
        read_index(trickle)
    assert time.monotonic() - start < 30


def test_a_trickling_shard_ends_in_a_sentence(
    make_shards, cache_folder: Path, trickle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [shard] = read_index(make_shards(2))
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    reader = ShardReader([shard._replace(folder=trickle, size=100_000_000)])
    with pytest.raises(InputError, match=r"only \d+ bytes in"):
        reader(0, 0)
    assert [path for path in cache_folder.rglob("*") if path.suffix in (".tar", ".part")] == []


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    (tmp_path / "prompts.txt").write_text("a cat\n" * 200)
    (tmp_path / "index.json").write_text("[" * 1200)
    with serving(str(tmp_path)) as server:
        server.faults["index.json"] = ["endless"]
        for read in (
            lambda: read_prompts(f"{server.url}/prompts.txt"),
            lambda: read_index(server.url),
            lambda: read_index(tmp_path),
        ):
            with pytest.raises(InputError, match="has more than 1000 bytes; divide it"):
                read()
    assert len(read_prompts(f"{tmp_path}/prompts.txt")) == 200  # a local one is read line by line


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    for name in ("prompts.txt", "prompts.jsonl", "pairs.csv", "pairs.parquet", "pairs.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("prompts.txt", "prompts.jsonl", "zero.txt"):
        with pytest.raises(InputError, match=f"{name} is a pipe or a device; write its content"):
            read_prompts(f"{tmp_path}/{name}")
    for name in ("pairs.csv", "pairs.parquet", "pairs.tar"):
        source, output = str(tmp_path / name), str(tmp_path / "out")
        with pytest.raises(SystemExit) as stop:
            main(["shards", "convert", "--source", source, "--output", output])
        assert f"{name} is a pipe or a device" in str(stop.value.code)
    with pytest.raises(InputError, match="pairs.tar is a pipe or a device"):
        scan_shard(tmp_path / "pairs.tar")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "index.json")
    with pytest.raises(InputError, match="index.json is a pipe or a device"):
        read_index(folder)

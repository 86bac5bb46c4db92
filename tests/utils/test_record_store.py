"""A store of records: whole or absent, checked, and removed oldest first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lit_prefopt.utils.record_store import HEAD, RecordStore, remove_oldest, size_of
from tests.helpers.runs import same

TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.randn(4).bfloat16()}


def test_a_record_comes_back(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "store")
    assert store.read("kind", "key") is None
    assert ("kind", "key") not in store
    size = store.write("kind", "key", TENSORS)
    assert ("kind", "key") in store
    assert same(RecordStore(tmp_path / "store").read("kind", "key"), TENSORS)
    assert store.path("kind", "key").stat().st_size == size == size_of(tmp_path)
    assert [*store.keys("kind")] == ["key"]
    assert [*store.keys("other")] == []
    store.write("kind", "key", {"a": torch.ones(1)})
    assert same(store.read("kind", "key"), {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["key"]


@pytest.mark.parametrize("at", [0, HEAD - 1, HEAD + 3, -1])
def test_a_changed_byte_is_found(at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = RecordStore(tmp_path)
    store.write("kind", "key", TENSORS)
    path = store.path("kind", "key")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert store.read("kind", "key") is None
    assert f"{path} was damaged and is made again." in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 5, HEAD, -1])
def test_a_cut_record_is_found(size: int, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.write("kind", "key", TENSORS)
    path = store.path("kind", "key")
    path.write_bytes(path.read_bytes()[:size])
    assert store.read("kind", "key") is None


def test_nothing_without_its_checksum_is_read(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    path = store.path("kind", "key")
    path.parent.mkdir(parents=True)
    path.write_bytes(save(TENSORS))
    assert store.read("kind", "key") is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        RecordStore(tmp_path).write("kind", "key", TENSORS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_partial_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.1.partial", tmp_path / ".b.2.partial"
    for path in (old, new):
        path.write_bytes(b"123")
    os.utime(old, (0, 0))
    assert size_of(tmp_path) == 3
    assert not old.exists()
    assert new.exists()


def test_the_least_recently_changed_folders_go_first(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("new", "old", "middle")]
    for age, folder in zip((3, 1, 2), folders, strict=True):
        folder.mkdir()
        (folder / "file").write_bytes(bytes(10))
        os.utime(folder, (age, age))
    assert remove_oldest(folders, 0) == 0
    assert remove_oldest(folders, 11) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert remove_oldest([tmp_path / "absent"], 1) == 0

"""Errors of the operating system are sentences that name the file and the cure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.os_errors import explain_os_error, name_output
from tests.helpers.runs import file_size_limit


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "x", "a.tar"),
            "a.tar cannot be written (No space left on device): free disk space or choose another "
            "folder.",
        ),
        (
            OSError(errno.EMFILE, "x", "pairs/b.png"),
            "pairs/b.png cannot be opened, read or written (Too many open files): raise the limit "
            "on open files, such as `ulimit -n 65536`.",
        ),
        (
            # as another process hands it over
            OSError("Caught OSError in a worker.\nOSError: [Errno 13] Permission denied: 'c.json'"),
            "c.json cannot be opened, read or written (Permission denied): change its permissions "
            "or choose another path.",
        ),
        (
            RuntimeError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
            "A file cannot be written (Disk quota exceeded): raise the quota, free disk space or "
            "choose another folder.",
        ),
        (OSError(errno.ENOENT, "x"), None),  # without a file it says nothing
        (KeyError("name"), None),
        (InputError("a cure that quotes [Errno 28] No space left on device"), None),
    ],
)
def test_the_sentence_names_file_and_cure(error: Exception, sentence: str | None) -> None:
    assert explain_os_error(error) == sentence


def test_a_failure_that_was_handled_before_is_not_the_cause() -> None:
    error = KeyError("missing")
    error.__context__ = FileNotFoundError(errno.ENOENT, "x", "optional.json")
    assert explain_os_error(error) is None
    error.__cause__ = error.__context__
    assert "optional.json cannot be opened" in str(explain_os_error(error))


def test_a_long_path_is_shortened() -> None:
    sentence = explain_os_error(OSError(errno.ENAMETOOLONG, "x", "a" * 5000))
    assert sentence is not None
    assert len(sentence) < 700


def test_writers_of_other_libraries_name_the_output(tmp_path: Path) -> None:
    output, tensors = Path("weights"), {"a": torch.zeros(10_000)}
    too_large = pytest.raises(OSError, match=r"\[Errno 27\] File too large: 'weights'")
    with file_size_limit(5000), too_large, name_output(output), (tmp_path / "a").open("wb") as f:
        torch.save(tensors, f)
    with file_size_limit(5000), too_large, name_output(output):
        save_file(tensors, tmp_path / "b")


def test_a_temporary_name_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with file_size_limit(100), pytest.raises(OSError, match="File too large") as raised:
        write_atomic(path, "x" * 1000)
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match="Permission denied.*change its permissions"):
        main(["report", "--folder", str(tmp_path / "evaluation")])


def test_an_output_below_a_file_is_a_sentence(tmp_path: Path, tiny_folder: str) -> None:
    (tmp_path / "file").touch()
    output = ["--output", str(tmp_path / "file" / "unet")]
    with pytest.raises(
        SystemExit, match=r"/file cannot be opened.*\(File exists\): choose another path"
    ):
        main(["export", "--source", tiny_folder, "--to", "unet", *output])


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"PK\x80\x81")
    with pytest.raises(SystemExit, match=r"weights.yaml is not a text in UTF-8: name a YAML"):
        main(["rounds", "--config", str(path)])

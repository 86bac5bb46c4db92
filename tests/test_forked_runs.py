"""Runs that are forked from a process with imported libraries look like new interpreters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked import ForkedPopen
from tests.helpers.runs import launch

pytestmark = pytest.mark.slow
COMMAND = (sys.executable, "-m", "tests.helpers.interpreter")


@pytest.fixture(autouse=True, scope="module")
def set_by_a_library() -> None:
    """A variable that a library sets in a run that tests have in common, as Lightning does."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def run(popen: type[subprocess.Popen], file: Path, *more: str, **options: Any) -> dict[str, Any]:
    """Return what a process saw of itself, and check what others see of it."""
    process = launch([str(file), *more], COMMAND, popen, **options)
    assert process.communicate(timeout=120)[0].splitlines()[:2] == [
        "to the output",
        "to the errors",
    ]
    assert process.returncode == 3
    found = json.loads(file.read_text())
    assert found["pid"] == process.pid
    assert found["seen"]["parent"] == os.getpid()
    return found


def is_fork(pid: int) -> bool:
    return b"tests.helpers.forked" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"start_new_session": True}, {"process_group": 0}], ids=str
)
def test_a_fork_sees_what_a_new_interpreter_sees(options: dict[str, Any], tmp_path: Path) -> None:
    new, fork = (
        run(popen, tmp_path / "seen.json", **options) for popen in (subprocess.Popen, ForkedPopen)
    )
    added = fork["seen"].pop("environment").items() ^ new["seen"].pop("environment").items()
    assert {name for name, _ in added} <= {"TRANSFORMERS_VERBOSITY", "KMP_INIT_AT_FORK"}
    assert fork["seen"] == new["seen"]


def test_two_forks_differ(tmp_path: Path) -> None:
    a, b = (run(ForkedPopen, tmp_path / name) for name in ("a.json", "b.json"))
    assert a["random"] != b["random"]
    assert a["pid"] != b["pid"]


def test_what_a_fork_starts_is_its_own_child_and_a_fork(tmp_path: Path) -> None:
    outer = run(ForkedPopen, tmp_path / "outer.json", str(tmp_path / "inner.json"))
    inner = json.loads((tmp_path / "inner.json").read_text())
    assert inner["seen"]["parent"] == outer["pid"]
    assert inner["seen"]["argv"][1:] == [str(tmp_path / "inner.json")]
    assert inner["seen"]["environment"] == outer["seen"]["environment"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_the_fork(signum: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never read")  # to open it is to wait
    process = launch([str(tmp_path / "never read")], COMMAND)
    assert process.stdout is not None
    assert process.stdout.readline() == "to the output\n"
    assert is_fork(process.pid)
    process.send_signal(signum)
    process.communicate(timeout=120)
    assert process.returncode == -signum


def test_another_environment_is_that_of_a_new_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "never read")
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # which is read when a library is imported
    process = launch([str(tmp_path / "never read")], COMMAND)
    assert process.stdout is not None
    assert process.stdout.readline() == "to the output\n"
    assert not is_fork(process.pid)
    process.kill()
    process.communicate()

"""One process at a time writes an output, and none is kept out by one that has ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.utils import output_lock
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.utils.output_lock import (
    OutputLock,
    check_free_space,
    exclusive_output,
    release_locks,
)
from tests.helpers.runs import ROOT

HOLD = """
import sys, time, os
from lit_prefopt.utils.output_lock import OutputLock
lock = OutputLock(sys.argv[1], "", inside=sys.argv[2] == "inside")
lock.acquire()
if sys.argv[3] == "fork" and not os.fork():
    time.sleep(60)  # as a worker that has not noticed the end of its parent
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release_locks()


def hold(output: Path, *, inside: bool = False, fork: bool = False) -> subprocess.Popen[str]:
    """Start a process that holds an output's lock."""
    place, more = "inside" if inside else "beside", "fork" if fork else ""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), place, more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    assert int(holder.stdout.readline()) == holder.pid
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    """Kill a holder and its children."""
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()


@pytest.mark.parametrize("inside", [True, False])
def test_the_holder_is_named_and_its_kill_frees_the_lock(tmp_path: Path, inside: bool) -> None:
    output = tmp_path / "output"
    holder = hold(output, inside=inside, fork=True)
    try:
        second = OutputLock(output, "choose another", inside=inside)
        named = rf"output is being written by .*process {holder.pid} on .*, since 20.*: wait for "
        with pytest.raises(InputError, match=f"{named}its end, stop it, or choose another"):
            second.acquire()
        holder.kill()  # its child goes on
        holder.wait()
        second.acquire()
    finally:
        end(holder)
    second.release()
    assert not list(tmp_path.rglob(".*"))


def test_a_lock_file_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    output = tmp_path / "output"
    end(hold(output))
    assert (tmp_path / ".output-lock").exists()
    with exclusive_output(output):
        assert (tmp_path / ".output-lock").exists()
    assert not list(tmp_path.iterdir())


def test_the_same_process_may_take_it_again(tmp_path: Path) -> None:
    first, second = (OutputLock(tmp_path / "output", "") for _ in range(2))
    first.acquire()
    second.acquire()
    first.release()  # it is the second's now
    assert second.path.exists()
    second.release()
    assert not second.path.exists()


def test_a_forked_worker_does_not_release_it(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "output", "")
    with lock:
        worker = multiprocessing.get_context("fork").Process(target=release_locks)
        worker.start()
        worker.join()
        assert lock.path.exists()


def test_a_run_in_use_is_refused_before_anything_is_written(
    recipe: list[str], tmp_path: Path
) -> None:
    holder = hold(tmp_path / "run", inside=True)
    try:
        with pytest.raises(SystemExit, match=f"process {holder.pid} .*default_root_dir"):
            main(["fit", *recipe])
    finally:
        end(holder)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_left_overs_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = [".out.settings", ".out.v2.abcd1234.partial", ".other.abcd1234.partial", ".out.partial"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    killed = (
        Path(sys.executable),
        "-c",
        f"""
import os
from pathlib import Path
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.utils.output_lock import exclusive_output
output = Path({str(tmp_path / "out")!r})
with exclusive_output(output), atomic_output(output) as folder:
    folder.mkdir()
    os.kill(os.getpid(), 9)
""",
    )
    subprocess.run([*map(str, killed)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert len(list(tmp_path.glob(".out.????????.partial"))) == 1
    with exclusive_output(tmp_path / "out"), atomic_output(tmp_path / "out") as folder:
        folder.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_a_disk_without_space_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"not/there has .* free: 2 images need about .*GB; free"):
        check_free_space(tmp_path / "not" / "there", 10**18, "2 images need")
    check_free_space(tmp_path, 1)
    monkeypatch.setattr(output_lock, "LEAST_BYTES", 10**18)
    with pytest.raises(InputError, match="free disk space"), exclusive_output(tmp_path / "out"):
        raise AssertionError
    assert not list(tmp_path.iterdir())

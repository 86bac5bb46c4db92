"""A step of `rounds` ends with it, and has time to save what it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, lines, wait_for

STEP = """
import os, signal, sys, time
from lit_prefopt.utils.parent_watch import watch_parent

def save(signum, frame):
    time.sleep(0.5)  # as the writing of a checkpoint
    print(f"saved after {signal.Signals(signum).name}", file=log, flush=True)
    raise SystemExit(int(sys.argv[2]))

log = open(sys.argv[1], "a")
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, save)
watch_parent()
print(f"process {os.getpid()}", file=log)
print("ready", file=log, flush=True)
while True:
    time.sleep(0.05)
"""
ROUNDS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from lit_prefopt.commands.step_process import run_step
code = run_step([sys.executable, "-c", *sys.argv[1:]], dict(os.environ))
print("code", code)
sys.exit(code)
"""


def start(log: Path, code: int = 143) -> subprocess.Popen[str]:
    """Start a process that runs a step and waits for it."""
    rounds = subprocess.Popen(
        [sys.executable, "-c", ROUNDS, STEP, str(log), str(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(log, "ready", rounds)
    return rounds


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("everyone", [False, True], ids=["alone", "whole group"])
def test_a_signal_is_passed_on_once_and_waits_for_the_step(
    signum: signal.Signals, everyone: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    rounds = start(log)
    if everyone:  # as Ctrl-C in a terminal
        os.killpg(rounds.pid, signum)
    else:
        rounds.send_signal(signum)
    assert rounds.communicate(timeout=60)[0] == "code 143\n"
    assert lines(log)[2:] == [f"saved after {signum.name}"]


def test_a_step_that_ends_well_at_the_signal_is_the_last(tmp_path: Path) -> None:
    rounds = start(tmp_path / "log", code=0)
    rounds.send_signal(signal.SIGINT)
    assert rounds.communicate(timeout=60)[0] == "code 130\n"


def test_after_a_kill_the_step_saves_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rounds = start(log)
    rounds.kill()
    rounds.wait()
    end = time.monotonic() + 60
    while len(lines(log)) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert lines(log)[2:] == ["saved after SIGTERM"]
    step = int(lines(log)[0].split()[1])
    while Path(f"/proc/{step}/cmdline").exists() and time.monotonic() < end:
        if not Path(f"/proc/{step}/cmdline").read_bytes():
            break  # a zombie that nothing waits for
        time.sleep(0.05)
    assert time.monotonic() < end


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` starts it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        rounds = start(tmp_path / "log")
    finally:
        signal.signal(signal.SIGHUP, before)
    rounds.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert rounds.poll() is None
    rounds.send_signal(signal.SIGTERM)
    assert rounds.communicate(timeout=60)[0] == "code 143\n"

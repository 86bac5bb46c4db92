"""Run a step of `rounds` as a process that ends with it, and has time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from lit_prefopt.utils.parent_watch import PARENT

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL = 0.1  # seconds between two checks for signals


def run_step(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command, wait for its end, and return its exit code, 128 + N after signal N.

    A signal that stops this process is passed on to the command, which saves its state first. The
    command runs in its own process group, since Ctrl-C in a terminal reaches all of a group's
    processes and would be counted twice. After a SIGKILL of this process it gets a SIGTERM.

    Args:
        command: The program and its arguments.
        environment: The environment variables.
    """
    reader, writer = os.pipe()
    received: list[int] = []
    try:
        with _note(received):
            process = subprocess.Popen(
                command,
                env={**environment, PARENT: str(reader)},
                pass_fds=[reader],
                process_group=0,
            )
            passed = 0
            while True:
                for signum in received[passed:]:
                    process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)
                    passed += 1
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL)
                    break
    finally:
        os.close(reader)
        os.close(writer)  # the command ends too, if this ends by an exception
    if code:
        return 128 - code if code < 0 else code
    return 128 + received[0] if received else 0  # the signal came at the command's end


@contextmanager
def _note(received: list[int]) -> Iterator[None]:
    """Append signals to a list, in place of their effect; ignored ones stay ignored."""

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        known = {signum: signal.getsignal(signum) for signum in STOPS}
        before = {signum: own for signum, own in known.items() if own is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

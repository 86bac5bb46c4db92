"""Stop a process with the process that started it, even when that one is killed."""

from __future__ import annotations

import os
import signal
import threading

PARENT = "LIT_PREFOPT_PARENT"  # environment variable: reading end of the parent's pipe


def watch_parent() -> None:
    """Send SIGTERM to this process when its parent ends, if it has one that holds a pipe.

    The parent never writes into the pipe: the end of its process is the end of the pipe.
    """
    pipe = os.environ.pop(PARENT, None)  # children of this process have another parent
    if pipe is None or not pipe.isdecimal():
        return
    threading.Thread(target=_wait, args=(int(pipe), os.getpid()), daemon=True).start()


def _wait(pipe: int, process: int) -> None:
    try:
        os.read(pipe, 1)
    except OSError:  # not a pipe: the variable is of another program
        return
    os.kill(process, signal.SIGTERM)

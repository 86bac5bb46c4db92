"""What a worker does with signals: it leaves when its parent says so, and not before."""

from __future__ import annotations

import os
import signal
import sys
import threading


def heed_the_parent_alone(worker: int) -> None:
    """Let this worker outlive a Ctrl-C or SIGTERM that was meant for the run.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of a job. The run goes on to
    its next optimizer step before it stops, and needs its workers until then.

    Args:
        worker: Number of the worker, as DataLoader hands it to every `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)

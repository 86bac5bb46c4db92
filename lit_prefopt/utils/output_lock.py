"""Lock an output, so that two processes never write it at the same time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from lit_prefopt.errors import InputError
from lit_prefopt.utils.atomic_files import lock_name, remove_partial
from lit_prefopt.utils.os_errors import explain_os_errors, name_output

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEAST_BYTES = 2**20  # least free space with which a command starts
LONGEST = 80  # characters of a holder's entry in a message


class OutputLock:
    """A lock of the operating system on an output, which ends with the process that holds it.

    The lock file contains the holder: process, host, start and command. It is a POSIX record
    lock: forked workers do not inherit it, and a kill frees it. Between machines it holds on
    network file systems that support such locks (NFS does, unless it is mounted with `nolock`);
    where there are none, the output is written without a lock.

    Args:
        output: The folder or file that is written.
        cure: What else to do than to wait, for the message, or empty.
        inside: Whether the lock file stands in the output, a folder, or beside it.
    """

    held: ClassVar[dict[Path, OutputLock]] = {}
    """The locks of this process by their files."""

    def __init__(self, output: str | Path, cure: str, *, inside: bool = False) -> None:
        self.output, self.cure, self.inside = Path(output), cure, inside
        folder = self.output if inside else self.output.absolute().parent
        self.path = folder.absolute() / (".lock" if inside else lock_name(self.output.name))
        self._file, self._pid = -1, -1
        self._made: list[Path] = []

    def __enter__(self) -> OutputLock:
        """Acquire the lock."""
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self.release()

    def acquire(self) -> None:
        """Lock the output, check that it can be written, and remove left-overs of killed processes.

        Raises:
            InputError: Another process writes the output, or it cannot be written.
        """
        earlier = self.held.get(self.path)
        if earlier is not None:  # of this process, which writes one thing after the other
            self._file, self._pid, self._made = earlier._file, earlier._pid, earlier._made
            self.held[self.path] = self
            return
        with explain_os_errors(), name_output(self.output):
            folder = self.path.parent
            self._made = [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            self._pid = os.getpid()
            self.held[self.path] = self
            try:
                os.write(self._file, json.dumps(_holder()).encode())
            except OSError:
                self.release()
                raise
            remove_partial(folder, "*" if self.inside else self.output.name)

    def release(self) -> None:
        """Unlock the output, and remove the lock file and the folders that are still empty."""
        if self.held.get(self.path) is not self or self._pid != os.getpid():
            return
        del self.held[self.path]
        with suppress(OSError):  # an unwritable folder keeps an unlocked file, which does no harm
            self.path.unlink()
        os.close(self._file)
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _open(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(file)
                # the previous holder may have removed the file between the two calls
                if os.fstat(file).st_nlink:
                    os.ftruncate(file, 0)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _lock(self, file: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):
                return  # a file system without locks
            cure = f", stop it, or {self.cure}" if self.cure else " or stop it"
            raise InputError(
                f"{self.output} is being written by {self._describe_holder(file)}: wait for its "
                f"end{cure}."
            ) from error

    def _describe_holder(self, file: int) -> str:
        try:
            holder = json.loads(os.pread(file, 4096, 0))
            entries = {name: str(holder[name])[:LONGEST] for name in _holder()}
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
        return "`{command}` (process {process} on {host}, since {since})".format(**entries)


def release_locks() -> None:
    """Release all locks of this process."""
    for lock in [*OutputLock.held.values()]:
        lock.release()


@contextmanager
def exclusive_output(output: str | Path, option: str = "--output") -> Iterator[None]:
    """Hold an output's lock, and raise InputError for a full disk and the like.

    Args:
        output: The folder or file that is written.
        option: The command line's option of the output.
    """
    lock = OutputLock(output, f"choose another path with `{option} PATH`")
    with lock, explain_os_errors():
        check_free_space(output)
        yield


def check_free_space(output: str | Path, needed: int = 0, what: str = "its content needs") -> None:
    """Raise InputError if the disk of an output has less free space than needed.

    Args:
        output: A folder or file, which need not exist yet.
        needed: Number of bytes, estimated; at least LEAST_BYTES.
        what: What needs them, with its verb, for the message.
    """
    needed = max(needed, LEAST_BYTES)
    place = Path(output).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"The disk of {output} has {_bytes(free)} free: {what} about {_bytes(needed)}; "
            "free disk space or choose another folder."
        )


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _holder() -> dict[str, Any]:
    command = " ".join(["lit-prefopt", *sys.argv[1:2]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return {"command": command, "process": os.getpid(), "host": host, "since": since}

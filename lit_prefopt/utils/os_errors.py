"""Explain errors of the operating system: full disks, permissions, too many open files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_prefopt.errors import InputError

ELSEWHERE = "free disk space or choose another folder"
WRITTEN = {
    errno.ENOSPC: ELSEWHERE,
    errno.EDQUOT: f"raise the quota, {ELSEWHERE}",
    errno.EFBIG: f"raise the limit on the size of files (`ulimit -f`), {ELSEWHERE}",
    errno.EROFS: "choose a folder on a disk that is not mounted read-only",
}
"""Cures of errors that only writing raises."""

OPENED = {
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EIO: "check its disk and the connection to it, and start again",
    errno.ESTALE: "check the connection to its disk, and start again",
    errno.EMFILE: "raise the limit on open files, such as `ulimit -n 65536`",
    errno.ENFILE: "close other programs, or raise the machine's limit on open files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "choose another path",
    errno.ENOTEMPTY: "remove it or choose another path",
    errno.ELOOP: "repair the symbolic link",
    errno.ENXIO: "name a regular file",
    errno.EBUSY: "stop what uses it, and start again",
    errno.ETXTBSY: "stop what uses it, and start again",
}
"""Cures of errors of reading and writing."""

NUMBER = re.compile(r"(?:\[Errno |os error )(\d+)[])](?:[^:\n]{0,100}: '([^'\n]+)')?")
LONGEST = 500  # characters of a path in a message
TORCH_WRITER = "PytorchStreamWriter failed"  # without a number: the disk is full, or has failed


def explain_os_error(error: BaseException) -> str | None:
    """Return the sentence on an error of the operating system, or None for other errors.

    Args:
        error: An OSError, or an error of a library that contains one as text or as its context.
    """
    found: BaseException | None = error
    while found is not None:
        code, file = _number_and_file(found)
        cure = WRITTEN.get(code) or OPENED.get(code)
        if cure is not None and (file or code not in (errno.ENOENT, errno.EEXIST)):
            verb = "written" if code in WRITTEN else "opened, read or written"
            name = f"...{file[-LONGEST:]}" if len(file) > LONGEST else file or "A file"
            return f"{name} cannot be {verb} ({os.strerror(code)}): {cure}."
        found = found.__cause__
    return None


def _number_and_file(error: BaseException) -> tuple[int, str]:
    """Return the error number, 0 if there is none, and the file, empty if it is not known."""
    if isinstance(error, OSError) and error.errno is not None:
        file = "" if error.filename is None else os.fsdecode(error.filename)
        return error.errno, file
    if type(error) is RuntimeError and isinstance(error.__context__, OSError):
        return _number_and_file(error.__context__)  # torch, of a stream that it writes to
    if isinstance(error, InputError) or not isinstance(error, Exception):
        return 0, ""
    named = [*NUMBER.finditer(str(error))]  # of safetensors, or out of another process
    if named:
        return int(named[-1][1]), named[-1][2] or ""
    return (errno.EIO if TORCH_WRITER in str(error) else 0), ""


@contextmanager
def name_output(output: Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise failures to write as OSError with the name of the output.

    Args:
        output: The final path.
        temporary: Its temporary path, which is replaced in the errors.
    """
    try:
        yield
    except Exception as error:
        code, file = _number_and_file(error)
        inside = temporary is not None and Path(file).is_relative_to(temporary)
        unnamed = not file and (code in WRITTEN or code == errno.EIO)
        if not code or not (inside or unnamed):
            raise
        raise OSError(code, os.strerror(code), str(output)) from error


@contextmanager
def explain_os_errors() -> Iterator[None]:
    """Raise InputError for errors of the operating system, with the file and the cure."""
    try:
        yield
    except OSError as error:
        message = explain_os_error(error)
        if message is None:
            raise
        raise InputError(message) from error

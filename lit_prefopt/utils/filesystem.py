"""Access to local and remote files, with time-outs and retries, without shell commands."""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from lit_prefopt.errors import InputError, printable
from lit_prefopt.utils.addresses import check_address

T = TypeVar("T")
log = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds without a byte
SLOWEST = 10_000  # bytes per second, on average, beyond TIMEOUT
MOST_BYTES = 512_000_000  # of a file that is read whole: an index of twenty million samples
ATTEMPTS = 8
FIRST_WAIT = 1.0  # seconds; doubled after each attempt, up to a minute
FINAL = (401, 403, 405, 410)  # permanent errors; aiohttp also uses 400 for broken responses
# local errors, for which a retry does not help
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path inside it."""
    check_address(url)
    scheme = url.partition("://")[0].lower() if "://" in url else "file"
    try:
        # not `url_to_fs`, which would chain file systems at "::", also that of an IPv6 address
        kind = fsspec.get_filesystem_class(scheme)
        path = kind._strip_protocol(url)
        return kind(**{**kind._get_kwargs_from_urls(url), **_options(scheme)}), path
    except ImportError as error:
        if url.startswith("s3"):
            raise InputError(
                f"{url} needs s3fs; install it with `pip install 'lit-prefopt[s3]'`."
            ) from error
        raise InputError(f"{url} cannot be opened ({error}); install that package.") from error
    except ValueError as error:
        text = str(error).rstrip(".")
        raise InputError(f"{url} cannot be opened ({text}); give a folder or a URL.") from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a file system is the local one."""
    return isinstance(fs, LocalFileSystem)


def read_whole(url: str) -> bytes:
    """Return the content of a file, which is bounded in size, and in time if it is remote.

    Args:
        url: Path or URL of the file; a missing one raises FileNotFoundError.

    Raises:
        InputError: It is larger than MOST_BYTES, not a regular file, or cannot be fetched.
    """
    fs, path = filesystem(url)
    if is_local(fs):
        check_regular(path)
        try:
            TransferLimit(url, MOST_BYTES).relative_update(os.path.getsize(path))
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, InputError):
            raise
        except (OSError, ValueError) as error:  # ValueError for a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{url} cannot be read ({reason}); check the path.") from error
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        limited = partial(TransferLimit, url, MOST_BYTES)
        retry(url, lambda: fs.get_file(path, str(copy), callback=limited()))
        return copy.read_bytes()


def check_regular(path: str | Path) -> None:
    """Check that a path is not a pipe or a device, which may block or never end.

    Args:
        path: A local path; a missing file is accepted, as is a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # opening it raises the same error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a pipe or a device; write its content to a file first.")


class SlowTransferError(Exception):
    """A transfer is slower than SLOWEST; retried once."""

    cost = ATTEMPTS // 2


class TransferLimit(Callback):
    """Stops a transfer that is too large or too slow.

    Args:
        url: The file, for messages.
        most: Maximum size in bytes.
    """

    def __init__(self, url: str, most: float) -> None:
        super().__init__()
        self.url, self.most = url, most
        self.start: float | None = None  # of the first byte

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes."""
        super().relative_update(inc)
        if self.value > self.most:
            raise InputError(
                f"{self.url} has more than {self.most} bytes; divide it, or check the address."
            )
        now = time.monotonic()
        self.start = self.start or now
        seconds = now - self.start
        if self.value < SLOWEST * (seconds - TIMEOUT):
            raise SlowTransferError(f"only {self.value} bytes in {seconds:.0f} seconds")


def retry(url: str, action: Callable[[], T]) -> T:
    """Return the result of an action, which is retried after transient failures.

    Args:
        url: The resource, for the error message. A missing file raises FileNotFoundError.
        action: Fetches the resource; an error's attribute `cost` is the number of attempts that it
            counts for.
    """
    left = ATTEMPTS
    for attempt in count(1):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError, InputError, *BUGS):
            raise
        except Exception as error:  # each protocol has its own types
            reason = shorten(str(error) or type(error).__name__, 200)
            left -= getattr(error, "cost", 1)
            if left <= 0 or not _may_pass(error):
                raise InputError(
                    f"{url} cannot be fetched ({reason}; attempt {attempt}); check the address and "
                    "the connection, then resume."
                ) from error
            message = f"{url} cannot be fetched ({reason}); attempt {attempt}."
            log.warning("%s", printable(message))
        # not the global generator, which training may use
        jitter = random.SystemRandom().uniform(0.5, 1)
        time.sleep(min(60, FIRST_WAIT * 2 ** (attempt - 1)) * jitter)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if (
        isinstance(error, PermissionError | IsADirectoryError)
        or getattr(error, "errno", None) in LOCAL
    ):
        return False
    response = getattr(error, "response", None)  # the response in httpx and requests
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status not in FINAL


def _options(scheme: str) -> dict[str, Any]:
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's default limit is five minutes per file, too short for a large shard
        timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        headers = {"Accept-Encoding": "identity"}  # sizes and offsets refer to the uncompressed tar
        return {"get_client": _client, "client_kwargs": {"timeout": timeout, "headers": headers}}
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}}
    return {}


async def _client(**options: Any) -> Any:
    """Return a client without keep-alive connections.

    A forked worker inherits its parent's connections, and if it closes them, the parent's next
    request waits for the time-out.
    """
    from aiohttp import ClientSession, TCPConnector

    # trust_env: names and passwords of hosts come from ~/.netrc, proxies from the environment
    connector = TCPConnector(force_close=True)
    return ClientSession(connector=connector, trust_env=True, **options)

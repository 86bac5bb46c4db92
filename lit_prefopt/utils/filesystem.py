"""Access to local and remote files, with time-outs and retries, without shell commands."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from itertools import count
from textwrap import shorten
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lit_prefopt.errors import InputError

T = TypeVar("T")
log = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 8
FIRST_WAIT = 1.0  # seconds; doubled after each attempt, up to a minute
FINAL = (401, 403, 405, 410)  # permanent errors; aiohttp also uses 400 for broken responses
# local errors, for which a retry does not help
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path inside it."""
    if url.startswith("pipe:"):
        raise InputError(f"{url} would run a command; copy the shards to a folder first.")
    try:
        return fsspec.core.url_to_fs(url, **_options(url.split(":", 1)[0]))
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
            log.warning("%s cannot be fetched (%s); attempt %d.", url, reason, attempt)
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
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}}
    return {}


async def _client(**options: Any) -> Any:
    """Return a client without keep-alive connections.

    A forked worker inherits its parent's connections, and if it closes them, the parent's next
    request waits for the time-out.
    """
    from aiohttp import ClientSession, TCPConnector

    return ClientSession(connector=TCPConnector(force_close=True), **options)

"""Check addresses of files and servers: scheme, host, and no secrets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from lit_prefopt.errors import InputError, quoted, without_secrets

WEB = ("http", "https")
STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory")
SCHEMES = ("file", *WEB, *STORES)
"""File systems that are opened; others unpack archives, chain others, or run on kernels."""


def check_address(url: str) -> None:
    """Check that a path or URL can be opened: a known scheme, a host, and no secrets.

    Args:
        url: A path or URL of a file or folder.

    Raises:
        InputError: It cannot be opened, or it contains a secret.
    """
    check_secrets(url)
    if "\0" in url:
        raise InputError(f"{quoted(url)} contains a NUL character; check the path.")
    scheme, is_url, rest = url.partition("://")
    scheme = scheme.lower()
    if url.startswith("pipe:"):
        raise InputError(f"{url} would run a command; copy the shards to a folder first.")
    if not is_url:
        return
    if scheme not in SCHEMES:
        raise InputError(
            f"{quoted(url)} is not on a file system that is read; give a local path, or an "
            f"address with {', '.join(SCHEMES[1:-1])}."
        )
    if scheme == "file" and not rest.startswith("/"):
        raise InputError(f"{quoted(url)} names no absolute path; give the path without file://.")
    if not rest.strip("/") or not _can_be_parsed(url, scheme in WEB):
        raise InputError(f"{quoted(url)} is not an address; write it as {scheme}://HOST/PATH.")


def check_secrets(text: str) -> None:
    """Check that a text has no address with a password, a key or a token.

    Args:
        text: An address, or an argument with addresses.

    Raises:
        InputError: It has one; the message hides it.
    """
    hidden = without_secrets(text)
    if hidden == text:
        return
    address = next((word for word in re.split(r"[\s\"'\[\]]+", hidden) if "***" in word), hidden)
    raise InputError(
        f"The address {quoted(address)} contains a name, a password, a key or a token, which "
        "recipes and checkpoints would save; remove it, and put it into ~/.netrc (http), or into "
        "the environment variables or the configuration file of the store (s3: "
        "AWS_ACCESS_KEY_ID, ~/.aws), or download the file first."
    )


def _can_be_parsed(url: str, has_host: bool) -> bool:
    try:
        parts = urlsplit(url)
        return not has_host or (bool(parts.hostname) and url.isprintable() and parts.port != 0)
    except ValueError:  # brackets without an end, or a port that is no number
        return False

"""Addresses: which can be opened, and that no secret is printed or saved."""

from __future__ import annotations

import base64
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.shards.find import find_shards
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Endpoint
from lit_prefopt.prompts.files import PromptFile
from lit_prefopt.utils.addresses import check_address
from lit_prefopt.utils.filesystem import filesystem, is_local

SECRET = "s3cr3t-pa55word"


@pytest.mark.parametrize(
    "url",
    [
        "pairs",
        "/a/b::c",
        "a@b:c",
        "file:///a/b",
        "http://[::1]:80/a@b.txt",
        "HTTPS://host/a",
        "s3://bucket/a:b@c",
        "abfs://container@account/a",
        "hf://datasets/a/b@main/c",
        "https://docs.google.com/x/tq?tqx=out:csv#drawbench.csv",
    ],
)
def test_good_addresses(url: str) -> None:
    check_address(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1:1/pairs", "is not on a file system that is read; give a local path"),
        ("zip://pairs::/nowhere.zip", "is not on a file system"),
        ("simplecache::http://host/a", "is not on a file system"),
        ("reference://a", "is not on a file system"),
        ("python://a", "is not on a file system"),
        ("file://a/b", "names no absolute path"),
        ("http://", "is not an address; write it as http://HOST/PATH"),
        ("http://[::1", "is not an address"),
        ("http://host:port/a", "is not an address"),
        ("http://host:99999/a", "is not an address"),
        ("https://ho\nst/a", "is not an address"),
        ("s3://", "is not an address"),
        ("s3://[bucket/a.txt", "is not an address"),
        ("a\0b.txt", "contains a NUL character"),
        ("pipe:curl x", "would run a command"),
        ("x" * 5000 + "://a", "is not on a file system"),
    ],
)
def test_addresses_that_cannot_be_opened(url: str, message: str) -> None:
    for opens in (filesystem, find_shards, lambda url: PromptFile(url).texts()):
        with pytest.raises(InputError, match=message) as error:
            opens(url)
        assert len(str(error.value)) < 500


def test_a_local_path_is_never_parsed_as_a_chain(tmp_path: Path) -> None:
    fs, path = filesystem(f"{tmp_path}/zip::a")
    assert is_local(fs)
    assert path == f"{tmp_path}/zip::a"


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@127.0.0.1:1/pairs",
        f"http://{SECRET}@127.0.0.1:1/pairs",
        f"s3://AKIA:{SECRET}/x@bucket/pairs",
        f"simplecache::http://me:{SECRET}@127.0.0.1:1/pairs",
        f"https://127.0.0.1:1/{{a,b}}?X-Amz-Expires=9&X-Amz-Signature={SECRET}",
        f"https://127.0.0.1:1/a.txt?api_key={SECRET}",
        f"https://127.0.0.1:1/a.txt?id=1;sig={SECRET}#a.csv",
    ],
)
def test_secrets_are_refused_and_not_printed(
    address: str, tmp_path: Path, recipe: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"data: {{class_path: PairShards, init_args: {{shards: ['{address}']}}}}\n")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    commands = [
        ["shards", "validate", "--shards", address],
        ["fit", *recipe, "--data.shards", f'["{address}"]'],
        ["fit", *recipe, "--config", str(file), "--print_config"],
        ["fit", *recipe, f"--data.shardz={address}"],
        ["evaluate", "--config", "toy", "--judge", "Endpoint", "--judge.url", address],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert "***" in str(stop.value.code)
        assert "would save; remove it, and put it into ~/.netrc" in str(stop.value.code)
        assert SECRET not in str(stop.value.code)
    for build in (find_shards, lambda url: PromptFile(url).texts(), filesystem):
        with pytest.raises(InputError) as error:
            build(address)
        assert SECRET not in str(error.value)
    if address.startswith("http"):
        with pytest.raises(InputError, match="would save; remove it"):
            Endpoint(address)
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


class Guarded(SimpleHTTPRequestHandler):
    """Serves files to whoever has the password."""

    def do_GET(self) -> None:
        wanted = base64.b64encode(f"me:{SECRET}".encode()).decode()
        if self.headers["Authorization"] != f"Basic {wanted}":
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def guarded(folder: str) -> Iterator[str]:
    """Serve a folder with a password until the end of the block."""
    handler = functools.partial(Guarded, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_password_of_netrc_stands_nowhere(
    shards: str,
    recipe: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    netrc = tmp_path / "netrc"
    with guarded(shards) as url:
        with pytest.raises(InputError, match="401"):
            find_shards(url)
        netrc.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
        monkeypatch.setenv("NETRC", str(netrc))
        cache = ["--data.cache", str(tmp_path / "cache"), "--trainer.max_steps", "1"]
        main(["fit", *recipe, "--data.shards", url, *cache])
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        main(
            [
                "export",
                "--source",
                str(last),
                "--to",
                "unet",
                "--output",
                str(tmp_path / "out"),
            ]
        )
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != netrc]
    assert {"recipe.yaml", "last.ckpt"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert os.listdir(tmp_path / "cache")  # the shards were fetched

"""A real web server on this machine that misbehaves when it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, whole files only, and lists no folder.

    Attributes:
        faults: By file name what goes wrong with its next requests, one after the other: an
            answer code, or one of drop, stall, long, short, hasty (short, and then it hangs up),
            endless.
        served: How often each file was asked for.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = Path(folder)
        self.faults: dict[str, list[str | int]] = {}
        self.served: Counter[str] = Counter()
        self.pause = 0.0

    @property
    def url(self) -> str:
        """The address of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """Answers a GET."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.served[name] += 1
        time.sleep(self.server.pause)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        path = self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        length = {"short": -700, "hasty": -700, "long": 700}.get(str(fault), 0) + len(data)
        self.send_response(200)
        if fault != "endless":
            self.send_header("Content-Length", str(length))
        if fault in ("endless", "hasty"):
            self.send_header("Connection", "close")
        self.close_connection = fault is not None
        self.end_headers()
        self.send_body(data, str(fault))

    def send_body(self, data: bytes, fault: str) -> None:
        if fault in ("drop", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(3 if fault == "stall" else 0)
            return
        self.wfile.write(data)
        while fault == "endless":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: str) -> Iterator[Server]:
    """Serve a folder until the end of the block."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

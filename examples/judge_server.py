r"""Serve a judge over HTTP, for `Endpoint`: score batches of images sent as JSON.

    python examples/judge_server.py --judge PickScore --port 8100
    lit-prefopt fit --config sd15-dense-reward --data.prompts.path prompts.txt \
        --model.judge Endpoint --model.judge.url http://127.0.0.1:8100

An example: one batch at a time, without encryption or authentication. By default it listens only
on this machine (`--host`); put a reverse proxy in front of it for other machines.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lit_prefopt.data.images import BrokenSample, decode, from_pil
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Judge
from lit_prefopt.judges.judge import checked_scores
from lit_prefopt.lazy import import_classes

MOST_BYTES = 256 << 20  # of a batch


class JudgeServer(ThreadingHTTPServer):
    """HTTP server that scores one batch at a time.

    Args:
        judge: Scores the images.
        host: Address to listen at.
        port: Port to listen at; 0: any that is free.
        device: Device of the images.
    """

    daemon_threads = True

    def __init__(
        self, judge: Judge, host: str = "127.0.0.1", port: int = 0, device: str = "cpu"
    ) -> None:
        self.judge, self.device = judge, torch.device(device)
        self.one_at_a_time = threading.Lock()
        judge.prepare()
        super().__init__((host, port), Handler)

    def answer(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of a batch; for an empty one, the judge's settings."""
        texts, times = list(map(str, batch["prompts"])), batch.get("timesteps")
        images = [self.image(data) for data in batch["images"]]
        if len(images) != len(texts) or (times is not None and len(times) != len(texts)):
            raise ValueError("the numbers of prompts, images and timesteps must be equal")
        if not images:
            return {"scores": [], "settings": self.judge.settings()}
        with self.one_at_a_time:
            return {"scores": self.scores(images, texts, times)}

    def image(self, data: str) -> Tensor:
        """Decode an image to (3, H, W) in [-1, 1]."""
        picture = decode(base64.b64decode(data, validate=True))
        return from_pil(picture)

    def scores(
        self, images: Sequence[Tensor], texts: list[str], times: list[float] | None
    ) -> list[float]:
        """Return one score per image; sizes may differ."""
        found = [0.0] * len(texts)
        for size in {image.shape for image in images}:
            which = [i for i, image in enumerate(images) if image.shape == size]
            batch = torch.stack([images[i] for i in which]).to(self.device)
            t = None if times is None else torch.tensor([times[i] for i in which])
            scores = checked_scores(self.judge, batch, [texts[i] for i in which], t)
            for i, score in zip(which, scores.tolist(), strict=True):
                found[i] = score
        return found


class Handler(BaseHTTPRequestHandler):
    """Handler of POST requests."""

    server: JudgeServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a client to send

    def do_POST(self) -> None:
        """Send the scores, or an error message."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MOST_BYTES:
            self.close_connection = True
            return self.send_json(413, {"error": f"a batch has from 1 to {MOST_BYTES} bytes"})
        try:
            batch = json.loads(self.rfile.read(length))
            return self.send_json(200, self.server.answer(batch))
        except (ValueError, KeyError, TypeError, BrokenSample, InputError) as error:
            return self.send_json(400, {"error": str(error)})

    def send_json(self, status: int, content: dict[str, Any]) -> None:
        """Send a JSON response."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(args: list[str] | None = None) -> None:
    """Serve until it is stopped.

    Args:
        args: Command-line arguments; by default the process's own.
    """
    # the parser finds a class by its short name once its module is imported
    import_classes({word.split("=")[-1] for word in args or sys.argv})
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Judge, "judge")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8100, help="port to listen at")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    built = parser.instantiate(parser.parse_args(args))
    server = JudgeServer(built.judge, built.host, built.port, built.device)
    print(f"http://{built.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()

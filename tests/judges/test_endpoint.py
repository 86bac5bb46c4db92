"""A judge behind HTTP, on this machine: right answers, wrong ones, none, and one that dies."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.judge_server import JudgeServer
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Endpoint, Judge
from lit_prefopt.toy import ToyJudge
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import all_scenes

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["a", "b", "c"]


class Bright(Judge):
    """Prefers what is bright, the brighter the later.

    Args:
        gain: Factor of the scores.
    """

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        later = 1 if t is None else 1 + t.to(images)
        return self.gain * later * images.mean((1, 2, 3)) + len(texts[0])


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Odd(BaseHTTPRequestHandler):
    """Answers what the test says, request by request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        asked: list = self.server.asked  # type: ignore[attr-defined]
        answers: list = self.server.answers  # type: ignore[attr-defined]
        answer = answers[min(len(asked), len(answers) - 1)]
        asked.append(self.path)
        if callable(answer):
            return answer(self)
        return self.reply(*answer)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
            body = b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class OddServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def answering(*answers: tuple[int, bytes] | Callable) -> Iterator[tuple[str, list]]:
    server = OddServer(("127.0.0.1", 0), Odd)
    server.answers, server.asked = answers, []  # type: ignore[attr-defined]
    with running(server) as url:
        yield url, server.asked  # type: ignore[attr-defined]


def good(count: int = 3) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [0.5] * count}).encode()


def ask(url: str, **options: float) -> Tensor:
    settings = {"retries": 2, "pause": 0.01, "timeout": 5.0} | options
    return Endpoint(url, **settings).score(torch.zeros(3, 3, 8, 8), TEXTS)


def test_scores_are_those_of_the_judge_behind_it() -> None:
    scenes = all_scenes()[:5]
    captions = [scene.caption() for scene in scenes]
    images = render(scenes)
    images[1] *= 0.5
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # eight bits, as they travel
    with running(JudgeServer(ToyJudge())) as url:
        judge = Endpoint(url, batch_size=2)
        judge.prepare()
        scores = judge.score(images, captions)
        assert judge.settings()["server"] == {"class": "ToyJudge"}
    torch.testing.assert_close(scores, ToyJudge().score(images, captions), atol=1e-6, rtol=0)
    assert scores.std() > 0.01


def test_timesteps_reach_the_judge() -> None:
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    t = torch.tensor([0, 5, 9])
    with running(JudgeServer(Bright(2.0))) as url:
        judge = Endpoint(url, batch_size=3)
        scores = judge.score(images, TEXTS, t)
        assert judge.score(images, TEXTS).tolist() == pytest.approx([-1, 1, 3], abs=0.01)
    torch.testing.assert_close(scores, Bright(2.0).score(images, TEXTS, t), atol=0.1, rtol=0)


def test_passing_faults_are_asked_again() -> None:
    def drop(handler: Odd) -> None:
        handler.close_connection = True

    def half(handler: Odd) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores":')
        handler.close_connection = True

    for fault in ((500, b""), (503, b"busy"), (429, b""), drop):
        with answering(fault, fault, good()) as (url, asked):
            assert ask(url).tolist() == [0.5] * 3
            assert len(asked) == 3
    with answering(half, good()) as (url, asked):
        assert ask(url).tolist() == [0.5] * 3


NONSENSE = {
    "html": ((200, b"<html>"), r"returned '<html>', which is not JSON with `scores`"),
    "list": ((200, b"[1, 2, 3]"), r"which is not JSON with `scores`"),
    "none": ((200, b'{"scores": null}'), r"which is not JSON with `scores`"),
    "empty": ((200, b""), r"returned '', which is not JSON"),
    "deep": ((200, b"[" * 100_000), r"which is not JSON with `scores`"),
    "text": ((200, b'{"scores": "abc"}'), r"returned 0 numbers for 3 images"),
    "words": ((200, b'{"scores": [1, "2", true]}'), r"returned 1 numbers for 3 images"),
    "few": (good(2), r"returned 2 numbers for 3 images"),
    "many": (good(4), r"returned 4 numbers for 3 images"),
    "nan": ((200, b'{"scores": [1, NaN, 2]}'), r"returned a score that is not finite"),
    "infinite": ((200, b'{"scores": [1, 2, -Infinity]}'), r"returned a score that is not finite"),
    "huge": ((200, b'{"scores": [1, 2, 1e200]}'), r"returned a score that is not finite"),
    "not-found": ((404, b"{}"), r"returned status 404"),
    "refused": ((400, b"{}"), r"returned status 400"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_at_once(case: str) -> None:
    answer, said = NONSENSE[case]
    with answering(answer) as (url, asked):
        with pytest.raises(InputError, match=said) as error:
            ask(url)
        assert len(asked) == 1
    assert str(error.value).startswith(f"The judge at {url} ")
    assert str(error.value).count("\n") == 0


def test_redirects_are_not_followed() -> None:
    with answering(good()) as (other, asked), answering((302, other.encode())) as (url, _):
        with pytest.raises(InputError, match=r"returned status 302"):
            ask(url)
        assert not asked


def test_an_answer_is_read_no_further_than_its_bound() -> None:
    sent = []

    def endless(handler: Odd) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            sent.append(handler.wfile.write(b" " * 100_000))

    with answering(endless) as (url, _), pytest.raises(InputError, match=r"more than 1000 bytes"):
        ask(url, most_bytes=1000)
    assert len(sent) < 200


def test_time_outs() -> None:
    def slow(handler: Odd) -> None:
        time.sleep(1)

    def trickle(handler: Odd) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    for fault in (slow, trickle):
        with answering(fault) as (url, asked):
            with pytest.raises(InputError, match=r"did not respond \(.*\): check the"):
                ask(url, timeout=0.2, retries=1)
            assert len(asked) == 2


def test_a_password_comes_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    told: list[str | None] = []

    def answer(handler: Odd) -> None:
        told.append(handler.headers["Authorization"])
        handler.reply(*good())

    with answering(answer) as (url, _):
        assert ask(url).tolist() == [0.5] * 3
    assert told == ["Basic " + base64.b64encode(b"me:secret").decode()]


def test_what_cannot_be_an_address() -> None:
    for url in ("file:///etc/passwd", "localhost:8000", "ftp://host/", "http", "x" * 9999):
        with pytest.raises(InputError, match="is not a judge.s address"):
            Endpoint(url)
    for url in ("http://", "http://[::1", "http://host:port/"):
        with pytest.raises(InputError, match="is not an address; write it as http://HOST"):
            Endpoint(url)
    with pytest.raises(InputError, match="timeout is 0"):
        Endpoint("http://127.0.0.1:1", timeout=0)
    with pytest.raises(InputError, match=r"did not respond"):
        Endpoint("http://127.0.0.1:1", retries=1, pause=0.01).prepare()


def test_the_example_refuses_bad_batches() -> None:
    with running(JudgeServer(Bright())) as url:
        judge = Endpoint(url, retries=0)
        for texts, images in ((["a"], []), (["a"], ["no base64!"]), (["a"], ["AAAA"])):
            with pytest.raises(InputError, match="returned status 400"):
                judge._request_scores(texts, images, None)
        assert judge.score(torch.zeros(1, 3, 8, 8), ["a"]).tolist() == pytest.approx([1], abs=0.01)


@pytest.mark.slow
def test_a_server_that_dies_stops_the_run_with_a_sentence() -> None:
    """The example as a process of its own, killed between two batches."""
    command = [sys.executable, "-m", "examples.judge_server", "--judge", "ToyJudge", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        judge = Endpoint(process.stdout.readline().decode().strip(), retries=1, pause=0.05)
        judge.prepare()
        scene = all_scenes()[0]
        image = render([scene])
        assert judge.score(image, [scene.caption()]).item() > 0.9
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(InputError, match=r"did not respond .*run again when it works"):
            judge.score(image, [scene.caption()])

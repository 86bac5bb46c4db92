"""HTTP client for a judge on a server: send batches as JSON, receive scores."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import requests
import torch
from requests.exceptions import ChunkedEncodingError, RequestException
from torch import Tensor

from lit_prefopt.data.images import to_pil
from lit_prefopt.errors import InputError, check_number, quoted
from lit_prefopt.judges.judge import Judge
from lit_prefopt.utils.addresses import check_address

PASSING = (429, 500, 502, 503, 504)
"""Status codes after which a request is repeated."""

PIECE = 65536  # bytes of a response read at a time


class Endpoint(Judge):
    """Scores images by HTTP requests to a server with any model, without this library.

    The request is a POST of `{"prompts": [...], "images": [...]}`, each image a PNG in base64, and
    `"timesteps": [...]` if there are any; the response is `{"scores": [...]}`, one finite number
    per image. The response to an empty batch, which is sent before a run, is `{"scores": []}`;
    evaluations save its optional `"settings"`. `examples/judge_server.py` serves any judge of
    this library.

    Transient failures (no connection, a time-out, 429, 500, 502, 503, 504) are retried with
    exponential backoff. Redirects are not followed. Name and password of a host come from
    ~/.netrc (or the file named by NETRC), because evaluations save the address.

    Args:
        url: Address of the server, http or https.
        batch_size: Images per request.
        timeout: Time-out in seconds for the connection, for each part of a response, and for the
            whole response.
        retries: Maximum number of retries.
        pause: Seconds before the first retry.
        most_bytes: Maximum size of a response in bytes.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 5,
        pause: float = 1.0,
        most_bytes: int = 1 << 20,
    ) -> None:
        if not url.lower().startswith(("http://", "https://")):
            raise InputError(f"{quoted(url)} is not a judge's address: use http://HOST:PORT/PATH.")
        check_address(url)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("retries", retries, 0),
            ("pause", pause, 0),
            ("most_bytes", most_bytes, 1),
        ):
            check_number(name, value, least)
        check_number("timeout", timeout, above=0)
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.retries, self.pause, self.most_bytes = retries, pause, most_bytes
        self.server_settings: dict[str, Any] = {}  # sent by the server

    def prepare(self) -> None:
        """Check the server with an empty batch."""
        settings = self._request_scores([], [], None).get("settings", {})
        self.server_settings = settings if isinstance(settings, dict) else {}

    def settings(self) -> dict[str, Any]:
        """Return the settings that an evaluation saves, including the server's own."""
        return super().settings() | (
            {"server": self.server_settings} if self.server_settings else {}
        )

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1]; they are sent with 8 bits per channel.
            texts: B prompts.
            t: Timesteps (B,) that the images were predicted at.

        Raises:
            InputError: The server returns no scores.
        """
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            times = None if t is None else t[part].tolist()
            pictures = [_png(image) for image in images[part]]
            scores += self._request_scores(list(texts[part]), pictures, times)["scores"]
        return torch.tensor(scores, dtype=torch.float32).to(images.device)

    def _request_scores(
        self, texts: list[str], images: list[str], times: list[float] | None
    ) -> dict[str, Any]:
        """Request a batch's scores and return the response, after a check of the scores."""
        batch: dict[str, Any] = {"prompts": texts, "images": images}
        if times is not None:
            batch["timesteps"] = times
        response = self._request(json.dumps(batch).encode())
        try:
            reply = json.loads(response)
            scores = reply["scores"]
            numbers = [float(score) for score in scores if type(score) in (float, int)]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            start = response[:60].decode(errors="replace")
            raise self._refused(
                f"returned {quoted(start)}, which is not JSON with `scores`"
            ) from error
        if len(scores) != len(images) or len(numbers) != len(scores):
            raise self._refused(f"returned {len(numbers)} numbers for {len(images)} images")
        if not torch.tensor(numbers, dtype=torch.float32).isfinite().all():
            raise self._refused("returned a score that is not finite")
        return {**reply, "scores": numbers}

    def _request(self, body: bytes) -> bytes:
        """Return the body of a response; transient failures are retried."""
        why = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                status, response = self._post(body)
            except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
                why = f"did not respond ({_reason(error)})"
                continue
            except RequestException as error:
                raise self._refused(f"cannot be reached ({_reason(error)})") from error
            if status == 200:
                return response
            why = f"returned status {status}"
            if status not in PASSING:
                break
        raise self._refused(why)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Send one request, and return status and body of the response."""
        until = time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        with requests.post(
            self.url,
            data=body,
            headers=headers,
            timeout=self.timeout,
            stream=True,
            allow_redirects=False,
        ) as response:
            content = b""
            if response.status_code == 200:
                # streamed, to bound its size and its time
                while piece := _piece(response):
                    content += piece
                    if len(content) > self.most_bytes:
                        raise self._refused(f"returned more than {self.most_bytes} bytes")
                    if time.monotonic() > until:
                        raise requests.Timeout(f"no complete response in {self.timeout:g} seconds")
            return response.status_code, content

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"The judge at {self.url} {what}: check the server's log, and run again when it "
            "works (limits are set by `retries`, `timeout` and `most_bytes`)."
        )


def _piece(response: requests.Response) -> bytes:
    try:
        return response.raw.read1(PIECE, decode_content=False)
    except Exception as error:  # of urllib3, http.client or the system
        raise requests.ConnectionError(f"the response was cut short: {error}") from error


def _png(image: Tensor) -> str:
    file = io.BytesIO()
    to_pil(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _reason(error: BaseException) -> str:
    """Return the root cause of a chain of wrapped network errors."""
    text = str(error)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"

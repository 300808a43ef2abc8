"""One streamed request to an OpenAI-compatible server, and when each piece of its reply came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybriMoEError

if TYPE_CHECKING:
    import httpx

REFUSED = (429, 503)
"""Statuses with which servers say that their queue is full."""


class ServerError(HybriMoEError):
    """The server that is measured cannot be reached, or answers something else than the API says."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply.

    times_s: clock readings in seconds, of sending and then of every piece of text. refused: the queue was full, and
    all else is empty.
    """

    prompt: str
    text: str
    times_s: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    refused: bool = False

    @property
    def ttft_ms(self) -> float:
        """From sending to the first piece of text; waiting in the server's queue is part of it."""
        return 1e3 * (self.times_s[1] - self.times_s[0])

    @property
    def between_ms(self) -> list[float]:
        """Times between the pieces of text. A piece may hold more than one token where characters span tokens."""
        return [1e3 * (b - a) for a, b in zip(self.times_s[1:], self.times_s[2:], strict=False)]


class Client:
    """Asks one model of one server. `url` is the address before `/v1`. Raises ServerError where nothing answers."""

    def __init__(self, http: httpx.Client, url: str, model: str | None = None) -> None:
        self._http, self.url = http, url.rstrip("/").removesuffix("/v1")
        self.model = self._first_model() if model is None else model

    def _first_model(self) -> str:
        found = self._json("/v1/models").get("data")
        if not isinstance(found, list) or not found or "id" not in found[0]:
            raise ServerError(f"{self.url}/v1/models lists no model")
        return str(found[0]["id"])

    def _json(self, path: str) -> dict[str, Any]:
        import httpx

        try:
            answer = self._http.get(self.url + path)
            answer.raise_for_status()
            body = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"{self.url}{path} does not answer as an OpenAI-compatible server: {error}") from error
        return body if isinstance(body, dict) else {}

    def metric(self, name: str) -> float | None:
        """A value of the server's /metrics; None where it has no such page or figure."""
        import httpx

        try:
            answer = self._http.get(f"{self.url}/metrics")
        except httpx.HTTPError:
            return None
        found = [line for line in answer.text.splitlines() if line.split(" ")[0] == name]
        return float(found[0].split(" ")[1]) if answer.status_code == 200 and found else None

    def complete(self, prompt: str, new_tokens: int) -> Exchange:
        """The greedy continuation of `prompt`, at most `new_tokens`. Raises ServerError; a full queue is no error."""
        import httpx

        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        start = time.perf_counter()
        try:
            with self._http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if answer.status_code in REFUSED:
                    return Exchange(prompt, "", (start,), refused=True)
                if answer.status_code != 200:
                    raise ServerError(f"{self.url}/v1/completions: {answer.status_code} {answer.read().decode()[:300]}")
                return _exchange(prompt, start, _events(answer))
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url}/v1/completions: {error or type(error).__name__}") from error


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream. Raises ServerError for one that is an error or no JSON."""
    for line in answer.iter_lines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        try:
            event = json.loads(line.removeprefix("data:"))
        except ValueError as error:
            raise ServerError(f"the stream holds a line that is no JSON: {line[:200]}") from error
        if "error" in event:
            raise ServerError(f"the stream ended with an error: {event['error']}")
        yield event


def _exchange(prompt: str, start: float, events: Iterator[dict[str, Any]]) -> Exchange:
    times, pieces = [start], []
    usage: dict[str, Any] = {}
    for event in events:
        text = "".join(choice.get("text") or "" for choice in event.get("choices") or ())
        if text:
            times.append(time.perf_counter())
            pieces.append(text)
        usage = event.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return Exchange(
        prompt, "".join(pieces), tuple(times), int(usage.get("prompt_tokens", 0)),
        int(details.get("cached_tokens") or 0), int(usage.get("completion_tokens", len(pieces))),
    )  # fmt: skip

"""A server under mixed load for minutes: no request lost, none mixed up with another, memory flat.

Users send chats and texts, whole and streamed, short and long; some leave in the middle, some read slowly, some send
what is no request, or a prompt of 64 k tokens. Every reply is greedy, so each complete one must be what the same
request got alone before. A prompt that is longer than the context must be refused with the context that there is; then
others fill the context to its last token.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

from hybrimoe.bench.serve.client import REFUSED, ServerError
from hybrimoe.demo import HELD_OUT_FILE, demo_model_path

if TYPE_CHECKING:
    import httpx

__all__ = ["Load", "Report", "soak"]

Kind = Literal["plain", "leaving", "malformed", "slow", "long", "huge"]
SHARES: dict[Kind, float] = {"plain": 0.48, "leaving": 0.2, "malformed": 0.1, "slow": 0.1, "long": 0.1, "huge": 0.02}
HUGE_LEAVE = 0.2
"""Share of huge prompts whose client leaves while they are computed."""
N_PROMPTS, N_LONG_PROMPTS = 12, 2
PROMPT_WORDS = (3, 40)
MALFORMED = (
    b"{", b"[]", b"null", b'{"prompt": 1.5}', b'{"prompt": "x", "max_tokens": -2}', b'{"prompt": "x", "seed": "hot"}',
    b'{"prompt": "\\ud800"}', b'{"messages": "x"}', b'{"prompt": [99999999]}', b"\xff\xfe",
)  # fmt: skip
"""Bodies that no API takes; each is answered with 4xx."""
SLOW_SECONDS = 0.02
"""What a slow reader waits after each piece."""
LEAVE_SECONDS = 0.3
"""Time within which a client leaves that waits for a whole reply."""
RETRY_SECONDS = 0.1
SAMPLE_SECONDS = 1.0
END_SECONDS = 60.0
"""Time that the server has for what is left when the users have gone."""
FLAT = 0.02
"""Growth of the peak of resident memory from the second quarter of the time to the last that is still flat."""
RESIDENT = "hybrimoe_resident_bytes"
MOST_PROBLEMS = 20
"""Problems that a report tells."""


@dataclass(frozen=True, slots=True)
class Load:
    """minutes: how long users go on. requests: after so many they stop, too; None: no limit. long_words: of a long
    prompt. huge_tokens: of a huge one; 0: none is sent."""

    minutes: float
    users: int
    requests: int | None = None
    new_tokens: int = 12
    long_words: int = 400
    huge_tokens: int = 65_536
    seed: int = 0


@dataclass(slots=True)
class Report:
    """sent: requests by kind. ended: how they ended. resident_mib: of the server, once a second; empty where it does
    not tell. problems: what must not be; at most MOST_PROBLEMS are kept, `n_problems` counts all."""

    sent: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    resident_mib: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    n_problems: int = 0
    seconds: float = 0.0

    def problem(self, text: str) -> None:
        """Something that must not be."""
        self.n_problems += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(text)

    @property
    def growth(self) -> float | None:
        """Of the peak of resident memory, from the second quarter to the last; None for too few samples."""
        quarter = len(self.resident_mib) // 4
        if not quarter:
            return None
        return max(self.resident_mib[-quarter:]) / max(self.resident_mib[quarter : 2 * quarter]) - 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "sent": dict(self.sent), "ended": dict(self.ended), "seconds": self.seconds, "growth": self.growth,
            "resident_mib": self.resident_mib, "problems": self.problems, "n_problems": self.n_problems,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """A request and where it goes. `text_of` finds the text in an answer or a piece of one."""

    path: str
    body: dict[str, Any]
    text_of: Callable[[dict[str, Any]], str]

    def streamed(self) -> dict[str, Any]:
        """The body for a stream."""
        return {**self.body, "stream": True}


def soak(url: str, load: Load, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> Report:
    """Puts the server at `url` under load. Raises ServerError where it does not answer at all."""
    return asyncio.run(_Soak(url.rstrip("/"), load, progress).run())


class _Soak:
    def __init__(self, url: str, load: Load, progress: Callable[[int, int, str], None]) -> None:
        self._url, self._load, self._progress = url, load, progress
        self._report = Report()
        self._random = random.Random(load.seed)
        self._short = _requests(_texts(N_PROMPTS, PROMPT_WORDS, self._random), load.new_tokens)
        self._long = _requests(
            _texts(N_LONG_PROMPTS, (load.long_words, load.long_words), self._random), load.new_tokens
        )
        self._kinds = [kind for kind in SHARES if kind != "huge" or load.huge_tokens]
        self._huge: list[Request] = []
        self._too_many: list[int] = []
        self._context: int | None = None
        self._alone: dict[int, str] = {}

    async def run(self) -> Report:
        """See `soak`."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as self._http:
            try:
                await self._http.get("/health")
                if self._load.huge_tokens:
                    await self._choose_huge(self._load.huge_tokens)
                for request in (*self._short, *self._long, *self._huge):
                    self._alone[id(request)] = await self._whole(request)
            except httpx.HTTPError as error:
                raise ServerError(f"{self._url} does not answer: {error or type(error).__name__}") from error
            began_s = time.monotonic()
            self._end_s = began_s + 60.0 * self._load.minutes
            sampling = asyncio.create_task(self._sample())
            await asyncio.gather(
                *(self._user(random.Random(f"{self._load.seed} {n}")) for n in range(self._load.users))
            )
            sampling.cancel()
            self._report.seconds = time.monotonic() - began_s
            await self._nothing_is_left()
        self._check_memory()
        return self._report

    # The users -------------------------------------------------------------------------------------------------

    async def _user(self, numbers: random.Random) -> None:
        """One request after another until the time is over, or all have been sent."""
        report, limit = self._report, self._load.requests
        while time.monotonic() < self._end_s and (limit is None or report.sent.total() < limit):
            (kind,) = numbers.choices(self._kinds, [SHARES[kind] for kind in self._kinds])
            report.sent[kind] += 1
            try:
                report.ended[await self._send(kind, numbers)] += 1
            except Exception as error:  # noqa: BLE001  # whatever it is, it is what the soak looks for
                report.problem(f"{kind}: {type(error).__name__}: {error}")
            self._progress(report.sent.total(), limit or 0, "requests")

    async def _send(self, kind: Kind, numbers: random.Random) -> str:
        """How it ended."""
        asked = kind
        if kind == "malformed":
            return await self._malformed(numbers.choice(MALFORMED), numbers.choice(("completions", "chat/completions")))
        if kind == "huge":
            if self._context is not None and numbers.random() < 0.5:
                return await self._too_long(self._context)
            kind = "leaving" if numbers.random() < HUGE_LEAVE else kind
        requests = {"huge": self._huge, "long": self._long}.get(asked, self._short)
        request = numbers.choice(requests)
        if kind == "leaving":
            return await self._leaving(request, numbers)
        pause_s = SLOW_SECONDS if kind == "slow" else 0.0
        streamed = kind == "slow" or numbers.random() < 0.5
        text = await (self._read(request, pause_s) if streamed else self._whole(request))
        if text != self._alone[id(request)]:
            self._report.problem(f"{kind}: another reply than alone: {text!r}, not {self._alone[id(request)]!r}")
        return "complete"

    async def _malformed(self, body: bytes, path: str) -> str:
        answer = await self._http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        if not 400 <= answer.status_code < 500 or "error" not in answer.json():
            self._report.problem(f"{body!r} was answered with {answer.status_code}: {answer.text[:200]}")
        return "rejected"

    async def _choose_huge(self, n_tokens: int) -> None:
        """The huge prompts, as tokens: so many, or as many as the context has room for beside a reply; where that is
        fewer, the context is noted, and prompts of `n_tokens` must be refused. A server that leaves out the oldest
        tokens (`--context-shift`) answers them instead.

        Raises ServerError where the server does not tell its context or what a text is in tokens.
        """
        words = (demo_model_path() / HELD_OUT_FILE).read_text(encoding="utf-8")
        told, cut = await self._http.get("/props"), await self._http.post("/tokenize", json={"content": words})
        try:
            context, tokens = told.json()["default_generation_settings"]["n_ctx"], cut.json()["tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self._url} has no /props and /tokenize as HybriMoE has; leave huge prompts out"
            ) from error
        self._too_many = list(islice(cycle(tokens), n_tokens))
        self._huge = [self._of_tokens(self._too_many)]
        if context and n_tokens + self._load.new_tokens > context and await self._is_refused(self._huge[0]):
            self._context = context
            self._huge = [self._of_tokens(self._too_many[: max(1, context - self._load.new_tokens)])]

    async def _is_refused(self, request: Request) -> bool:
        return (await self._http.post(request.path, json=request.body)).status_code != 200

    def _of_tokens(self, tokens: list[int]) -> Request:
        body = {"prompt": tokens, "max_tokens": self._load.new_tokens, "temperature": 0}
        return Request("/v1/completions", body, _text)

    async def _too_long(self, context: int) -> str:
        """A prompt beyond the context, which the answer must name."""
        request = self._of_tokens(self._too_many)
        answer = await self._http.post(request.path, json=request.body)
        if answer.status_code != 400 or f"{context} tokens" not in answer.text:
            self._report.problem(
                f"{len(self._too_many)} tokens for a context of {context}: {answer.status_code} {answer.text[:200]}"
            )
        return "too long"

    async def _leaving(self, request: Request, numbers: random.Random) -> str:
        """In the middle of a stream, or while a whole reply is computed."""
        if numbers.random() < 0.5:
            try:
                await asyncio.wait_for(self._whole(request), numbers.uniform(0.0, LEAVE_SECONDS))
            except TimeoutError:
                return "left"
            return "complete"
        n_read = numbers.randrange(self._load.new_tokens)
        async with aclosing(self._pieces(request)) as pieces:
            async for _ in pieces:
                if n_read == 0:
                    return "left"
                n_read -= 1
        return "complete"

    # One exchange ----------------------------------------------------------------------------------------------

    async def _whole(self, request: Request) -> str:
        while True:
            answer = await self._http.post(request.path, json=request.body)
            if answer.status_code == 200:
                return request.text_of(answer.json())
            await self._refused(answer, request)

    async def _read(self, request: Request, pause_s: float) -> str:
        pieces = []
        async for piece in self._pieces(request):
            pieces.append(piece)
            await asyncio.sleep(pause_s)
        return "".join(pieces)

    async def _pieces(self, request: Request) -> AsyncGenerator[str, None]:
        """The texts of a stream. Raises ServerError for one that ends with an error, or without an end."""
        while True:
            async with self._http.stream("POST", request.path, json=request.streamed()) as answer:
                if answer.status_code == 200:
                    async for piece in _texts_of(answer, request):
                        yield piece
                    return
                await answer.aread()
            await self._refused(answer, request)

    async def _refused(self, answer: httpx.Response, request: Request) -> None:
        """Waits for a place. Raises ServerError for another answer than that there is none."""
        if answer.status_code not in REFUSED or "retry-after" not in answer.headers:
            raise ServerError(f"{request.path}: {answer.status_code} {answer.text[:300]}")
        self._report.ended["refused, and asked again"] += 1
        await asyncio.sleep(RETRY_SECONDS)

    # The server ------------------------------------------------------------------------------------------------

    async def _sample(self) -> None:
        while True:
            text = (await self._http.get("/metrics")).text
            found = [line.split(" ")[1] for line in text.splitlines() if line.split(" ")[0] == RESIDENT]
            if found:
                self._report.resident_mib.append(round(float(found[0]) / 2**20, 1))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _nothing_is_left(self) -> None:
        """Those who left are forgotten: nothing runs or waits soon after the users have gone."""
        end_s = time.monotonic() + END_SECONDS
        while time.monotonic() < end_s:
            health = (await self._http.get("/health")).json()
            if health["status"] == "ok" and health["running"] == health["waiting"] == 0:
                return
            await asyncio.sleep(RETRY_SECONDS)
        self._report.problem(f"{END_SECONDS:g} s after the last user the server still says {health}")

    def _check_memory(self) -> None:
        growth = self._report.growth
        if growth is not None and growth > FLAT:
            self._report.problem(
                f"resident memory grew by {growth:.1%} from the second quarter of the time to the last"
            )


async def _texts_of(answer: httpx.Response, request: Request) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ServerError(f"a stream ended with an error: {event['error']}")
            if event["choices"] and (text := request.text_of(event)):
                yield text
    raise ServerError("a stream ended without its end")


def _requests(texts: Sequence[str], new_tokens: int) -> list[Request]:
    """A text and a chat of each."""
    options = {"max_tokens": new_tokens, "temperature": 0}
    return [
        request
        for text in texts
        for request in (
            Request("/v1/completions", {"prompt": text, **options}, _text),
            Request("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **options}, _content),
        )
    ]


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def _content(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str((choice.get("message") or choice["delta"]).get("content") or "")


def _texts(n: int, n_words: tuple[int, int], numbers: random.Random) -> list[str]:
    """Beginnings of held-out paragraphs, repeated where they are too short."""
    words = (demo_model_path() / HELD_OUT_FILE).read_text(encoding="utf-8").split()
    starts = [numbers.randrange(len(words)) for _ in range(n)]
    return [" ".join(islice(cycle(words), start, start + numbers.randint(*n_words))) for start in starts]

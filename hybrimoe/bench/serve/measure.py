"""Users who talk to a server at the same time: times to the first token and between tokens, tokens a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from hybrimoe.bench.serve.client import Client, Exchange, ServerError
from hybrimoe.demo import HELD_OUT_FILE, demo_model_path

CHECK_WORDS = "The first thing that one sees"
"""The prompt whose greedy reply must be the same alone and beside the load."""
TURN_WORDS = 12
"""Words that a user adds in each further turn of a conversation."""
RETRY_S = 0.2
"""Seconds after which a user whose request was refused asks again."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: `requests` by each of the users, in conversations of `turns`; lengths in words and tokens."""

    requests: int
    turns: int
    prompt_words: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One number of users. Times in ms; `tokens_per_s` over all users, `user_tokens_per_s` within one reply."""

    users: int
    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_s: float
    user_tokens_per_s: float
    ttft_ms: dict[str, float]
    between_ms: dict[str, float]
    hit_rate: float | None


def measure(
    client: Client, users: Sequence[int], load: Load, progress: Progress = lambda done, total, what: None
) -> list[Row]:
    """One row for each number of users. Raises ServerError where a reply depends on who else is served."""
    alone = client.complete(CHECK_WORDS, load.new_tokens)
    rows = []
    for number, n_users in enumerate(users):
        done: list[int] = []

        def one_more(done: list[int] = done, n_users: int = n_users) -> None:
            done.append(1)
            progress(len(done), n_users * load.requests, f"{n_users} users")

        rows.append(_measure_users(client, n_users, load, alone, one_more, first_word=number * load.prompt_words))
    return rows


def _measure_users(
    client: Client, n_users: int, load: Load, alone: Exchange, one_more: Callable[[], None], first_word: int
) -> Row:
    started = threading.Barrier(n_users + 1)
    with ThreadPoolExecutor(n_users + 1) as pool:
        begin = time.perf_counter()
        talks = [
            pool.submit(_talk, client, load, started, one_more, first_word + user * 7 * load.prompt_words)
            for user in range(n_users)
        ]
        check = pool.submit(_check, client, load, started, alone)
        exchanges = [exchange for talk in talks for exchange in talk.result()]
        seconds = time.perf_counter() - begin
        check.result()
    return _row(n_users, exchanges, seconds, client.metric("hybrimoe_expert_hit_rate"))


def _check(client: Client, load: Load, started: threading.Barrier, alone: Exchange) -> None:
    started.wait()
    exchange = client.complete(CHECK_WORDS, load.new_tokens)
    if not exchange.refused and exchange.text != alone.text:
        raise ServerError(
            "the greedy reply to one prompt is not the same alone and beside other requests, so figures would mean"
            f" nothing: {alone.text[:60]!r} and {exchange.text[:60]!r}"
        )


def _talk(
    client: Client, load: Load, started: threading.Barrier, one_more: Callable[[], None], first_word: int
) -> list[Exchange]:
    """One user: a request after the other; what is refused is asked again and counted."""
    started.wait()
    exchanges: list[Exchange] = []
    answered, prompt = 0, ""
    while answered < load.requests:
        if not prompt:
            n_words = TURN_WORDS if answered % load.turns else load.prompt_words
            words = _words(first_word + answered * load.prompt_words, n_words)
            prompt = f"{exchanges[-1].prompt}{exchanges[-1].text} {words}" if answered % load.turns else words
        exchange = client.complete(prompt, load.new_tokens)
        if exchange.refused:
            exchanges.insert(0, exchange)
            time.sleep(RETRY_S)
            continue
        exchanges.append(exchange)
        answered, prompt = answered + 1, ""
        one_more()
    return exchanges


def _words(first: int, n_words: int) -> str:
    """`n_words` words of the package's held-out text, from word `first` on, from its beginning again at its end."""
    words = (demo_model_path() / HELD_OUT_FILE).read_text(encoding="utf-8").split()
    return " ".join(islice(cycle(words), first % len(words), first % len(words) + n_words))


def _row(n_users: int, exchanges: Sequence[Exchange], seconds: float, hit_rate: float | None) -> Row:
    answered = [exchange for exchange in exchanges if len(exchange.times_s) > 1]
    if not answered:
        raise ServerError("no request was answered with text; try another number of new tokens")
    between = [ms for exchange in answered for ms in exchange.between_ms] or [0.0]
    new = sum(exchange.new_tokens for exchange in answered)
    speeds = [
        (exchange.new_tokens - 1) / (exchange.times_s[-1] - exchange.times_s[1])
        for exchange in answered
        if exchange.new_tokens > 1 and exchange.times_s[-1] > exchange.times_s[1]
    ]
    return Row(
        n_users, len(exchanges), sum(exchange.refused for exchange in exchanges),
        sum(exchange.prompt_tokens for exchange in answered), sum(exchange.cached_tokens for exchange in answered),
        new, seconds, new / seconds, float(np.median(speeds)) if speeds else 0.0,
        _percentiles([exchange.ttft_ms for exchange in answered]), _percentiles(between), hit_rate,
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]

"""What a server adds to a token that it streams, beside the same replies by the same engine in the same thread, which
nobody is sent: time to the first byte and between two tokens as a client sees them, and CPU time of the process.

The engine alone is the decode step and the choice of the token. Turning tokens into text and looking for stop texts is
done by its thread, too, but it is what serving adds: it is timed where it happens, and counted for the server. The
clients are a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from hybrimoe.bench.serve import reader
from hybrimoe.bench.serve.client import ServerError
from hybrimoe.bench.stopwatch import Stopwatch, Timed
from hybrimoe.generation.transcript import Transcript
from hybrimoe.server.apis.chat import ChatRequest
from hybrimoe.server.served import Served

if TYPE_CHECKING:
    from hybrimoe.generation import Reply
    from hybrimoe.generation.continuous_batching import BatchEngine
    from hybrimoe.server.asking import Prepared

__all__ = ["Figures", "Row", "measure"]


@dataclass(frozen=True, slots=True)
class Figures:
    """One quantity in ms: served and by the engine alone, each the median of the rounds; what the server adds, the
    difference of both; and the smallest and the largest difference of a round."""

    served_ms: float
    engine_ms: float
    added_ms: float
    added_ms_range: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One number of clients. first: to the first byte, of a question that was not asked before, on an open connection.
    between: two tokens of one reply, by the clock. cpu: of one token, all threads of the process. text_ms: what turning
    a token into text and looking for stop texts takes, which is part of what the server adds."""

    clients: int
    tokens: int
    first: Figures
    between: Figures
    cpu: Figures
    text_ms: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Round:
    """One round, in ms as in `Row`."""

    first_ms: float
    between_ms: float
    cpu_ms: float
    text_ms: float = 0.0


def measure(served: Served, url: str, clients: Sequence[int], new_tokens: int, rounds: int) -> list[Row]:
    """One row for each number of clients. The first round of each is not counted. served: the model, behind `url`.

    Raises ServerError where a client does not get all its tokens.
    """
    numbers = count()
    return [_row(n, served, url, new_tokens, rounds, numbers) for n in clients]


def _row(clients: int, served: Served, url: str, new_tokens: int, rounds: int, numbers: Iterator[int]) -> Row:
    pairs = []
    for _ in range(rounds + 1):
        asked = [ChatRequest(**reader.body(next(numbers), new_tokens)).asked() for _ in range(clients)]
        prepared = [served.preparation.chat(one) for one in asked]
        alone = served.worker().between_steps(partial(_engine_round, served, prepared)).result()
        asked_numbers = [next(numbers) for _ in range(clients)]
        pairs.append((_served_round(url, asked_numbers[0], clients, new_tokens), alone))
    pairs = pairs[1:]
    return Row(
        clients, clients * new_tokens, _figures(pairs, lambda one: one.first_ms),
        _figures(pairs, lambda one: one.between_ms), _figures(pairs, lambda one: one.cpu_ms),
        median(alone.text_ms for _, alone in pairs),
    )  # fmt: skip


def _figures(pairs: Sequence[tuple[_Round, _Round]], ms: Callable[[_Round], float]) -> Figures:
    """Of rounds with the server, each beside one of the engine alone."""
    served, engine = (median(map(ms, rounds)) for rounds in zip(*pairs, strict=True))
    differences = [ms(with_server) - ms(alone) for with_server, alone in pairs]
    return Figures(served, engine, served - engine, (min(differences), max(differences)))


def _engine_round(served: Served, prepared: Sequence[Prepared]) -> _Round:
    """The replies, computed beside each other. Called by the thread that generates."""
    engine = served.engine
    assert engine is not None
    waiting = list(prepared)
    times_s: dict[Reply, list[float]] = {}
    watch, begin = Stopwatch("text"), time.process_time()
    with watch.watching([Timed("text", Transcript, "push")]):
        while waiting or engine.n_running:
            _admit(engine, waiting)
            for progress in engine.step():
                times_s.setdefault(progress.reply, []).extend([time.perf_counter()] * bool(progress.text))
        seconds = time.process_time() - begin
    text_ms = watch.median_us(lambda call: call["text"].wall_us) / 1e3
    n_tokens = sum(len(reply.token_ids) for reply in times_s)
    between_ms = mean(map(reader.between_ms, times_s.values())) - len(prepared) * text_ms
    first_ms = mean(reply.times.ttft_us for reply in times_s) / 1e3
    return _Round(first_ms, between_ms, 1e3 * seconds / n_tokens - text_ms, text_ms)


def _admit(engine: BatchEngine, waiting: list[Prepared]) -> None:
    while waiting and engine.has_room(waiting[0].prompt_ids, waiting[0].options):
        one = waiting.pop(0)
        engine.admit(one.prompt_ids, one.options, lambda: False)


def _served_round(url: str, first: int, clients: int, new_tokens: int) -> _Round:
    """The replies to questions from number `first` on, sent to clients. Raises ServerError."""
    words = [sys.executable, "-m", reader.__name__, url, str(first), str(clients), str(new_tokens)]
    begin = time.process_time()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.process_time() - begin
    if done.returncode != 0:
        raise ServerError(f"the clients ended with an error: {done.stderr.strip()[-300:]}")
    read = json.loads(done.stdout)
    counts, first_ms, between_ms = zip(*read, strict=True)
    if set(counts) != {new_tokens}:
        raise ServerError(f"expected {new_tokens} tokens for each of {clients} clients, they were sent {list(counts)}")
    return _Round(mean(first_ms), mean(between_ms), 1e3 * seconds / sum(counts))

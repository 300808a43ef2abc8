"""What a server adds to a token that it streams: CPU time of its process, less that of the same replies without it.

Both are computed by the same engine in the same thread; the clients are a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrimoe.bench.serve import reader
from hybrimoe.bench.serve.client import ServerError
from hybrimoe.server.apis.chat import ChatRequest
from hybrimoe.server.served import Served

if TYPE_CHECKING:
    from hybrimoe.generation.continuous_batching import BatchEngine
    from hybrimoe.server.asking import Prepared

__all__ = ["Row", "measure"]


@dataclass(frozen=True, slots=True)
class Row:
    """One number of clients. CPU time of one token, in us: served, and by the engine alone, each of the round that was
    disturbed least; the difference; and the smallest and the largest difference of a round."""

    clients: int
    tokens: int
    served_us: float
    engine_us: float
    overhead_us: float
    overhead_us_range: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(served: Served, url: str, clients: Sequence[int], new_tokens: int, rounds: int) -> list[Row]:
    """One row for each number of clients. The first round of each is not counted. served: the model, behind `url`.

    Raises ServerError where a client does not get all its tokens.
    """
    return [_row(n, served, url, new_tokens, rounds) for n in clients]


def _row(clients: int, served: Served, url: str, new_tokens: int, rounds: int) -> Row:
    prepared = [
        served.preparation.chat(ChatRequest(**reader.body(client, new_tokens)).asked()) for client in range(clients)
    ]
    pairs = []
    for _ in range(rounds + 1):
        engine_s = served.worker().between_steps(lambda: _engine_seconds(served, prepared)).result()
        pairs.append((_served_seconds(url, clients, new_tokens), engine_s))
    us = np.array(pairs[1:]) * 1e6 / (clients * new_tokens)
    served_us, engine_us = us.min(axis=0)
    differences = us[:, 0] - us[:, 1]
    return Row(
        clients, clients * new_tokens, float(served_us), float(engine_us), float(served_us - engine_us),
        (float(differences.min()), float(differences.max())),
    )  # fmt: skip


def _engine_seconds(served: Served, prepared: Sequence[Prepared]) -> float:
    """CPU time in which the engine computes the replies beside each other. Called by the thread that generates."""
    engine = served.engine
    assert engine is not None
    begin = time.process_time()
    waiting = list(prepared)
    while waiting or engine.n_running:
        _admit(engine, waiting)
        for _ in engine.step():
            pass
    return time.process_time() - begin


def _admit(engine: BatchEngine, waiting: list[Prepared]) -> None:
    while waiting and engine.has_room(waiting[0].prompt_ids, waiting[0].options):
        one = waiting.pop(0)
        engine.admit(one.prompt_ids, one.options, lambda: False)


def _served_seconds(url: str, clients: int, new_tokens: int) -> float:
    """CPU time of this process while clients are sent the replies. Raises ServerError."""
    words = [sys.executable, "-m", reader.__name__, url, str(clients), str(new_tokens)]
    begin = time.process_time()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.process_time() - begin
    if done.returncode != 0:
        raise ServerError(f"the clients ended with an error: {done.stderr.strip()[-300:]}")
    counts = json.loads(done.stdout)
    if counts != [new_tokens] * clients:
        raise ServerError(f"expected {new_tokens} tokens for each of {clients} clients, they were sent {counts}")
    return seconds

"""Clients in a process of their own, which read streams to their end: `python -m hybrimoe.bench.serve.reader`.

Only the standard library is used, so that they start at once; their CPU time is not the server's.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

REPLY_S = 600.0
"""Seconds without a byte after which a server counts as dead."""
PATH = "/v1/chat/completions"
STOP = ["\n\nClient:", "\n\nServer:", "<the end>", "#####"]
"""Texts that end a reply, as front ends send them; no reply of these measurements has one."""


def body(number: int, new_tokens: int) -> dict[str, Any]:
    """What a client asks: exactly `new_tokens` greedy tokens, whatever they say. Each number is another question, of
    the same length for numbers below 900, so that nothing of it is known from an earlier one."""
    words = f"{100 + number} people ask: what does one see in the street in the morning?"
    return {
        "messages": [{"role": "user", "content": words}], "max_tokens": new_tokens, "temperature": 0,
        "ignore_eos": True, "stop": STOP, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def between_ms(times_s: Sequence[float]) -> float:
    """Mean ms between two pieces of a text that came at `times_s`, in the middle half of it: there all clients are
    served. Zero for fewer than three pieces."""
    first, last = len(times_s) // 4, 3 * len(times_s) // 4
    return 1e3 * (times_s[last] - times_s[first]) / (last - first) if len(times_s) > 2 else 0.0


def read(url: str, number: int, new_tokens: int) -> tuple[int, float, float]:
    """Tokens of the reply, by the server's own count (0 where the stream had no end), ms to its first byte on a
    connection that has had a request before, as those of a chat have, and ms between two tokens."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=REPLY_S)
    events, times_s = [], []
    try:
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.request("GET", "/health")
        connection.getresponse().read()
        asked, headers = json.dumps(body(number, new_tokens)), {"Content-Type": "application/json"}
        begin_s = time.perf_counter()
        connection.request("POST", PATH, asked, headers)
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: "):
                events.append(line)
                times_s.append(time.perf_counter())
    finally:
        connection.close()
    if answer.status != 200 or events[-1].strip() != b"data: [DONE]":
        return 0, 0.0, 0.0
    usage = json.loads(events[-2].removeprefix(b"data: "))["usage"]
    return int(usage["completion_tokens"]), 1e3 * (times_s[0] - begin_s), between_ms(times_s)


def main() -> None:
    """Arguments: address, number of the first client's question, clients, tokens of each; prints what `read` gives."""
    url = sys.argv[1]
    first, clients, new_tokens = map(int, sys.argv[2:])
    numbers = range(first, first + clients)
    with ThreadPoolExecutor(clients) as pool:
        sys.stdout.write(json.dumps(list(pool.map(lambda number: read(url, number, new_tokens), numbers))))


if __name__ == "__main__":
    main()

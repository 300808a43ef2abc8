"""Clients in a process of their own, which read streams to their end: `python -m hybrimoe.bench.serve.reader`.

Only the standard library is used, so that they start at once; their CPU time is not the server's.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

REPLY_S = 600.0
"""Seconds without a byte after which a server counts as dead."""
PATH = "/v1/chat/completions"


def body(client: int, new_tokens: int) -> dict[str, Any]:
    """What a client asks: exactly `new_tokens` greedy tokens, whatever they say."""
    words = f"Client {client} asks: what does one see in the street in the morning?"
    return {
        "messages": [{"role": "user", "content": words}], "max_tokens": new_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def read(url: str, client: int, new_tokens: int) -> int:
    """Tokens of the reply, by the server's own count; 0 where the stream had no end."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=REPLY_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", PATH, json.dumps(body(client, new_tokens)), headers)
        answer = connection.getresponse()
        lines = [line for line in answer.read().decode().splitlines() if line]
    finally:
        connection.close()
    if answer.status != 200 or lines[-1] != "data: [DONE]":
        return 0
    return int(json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"])


def main() -> None:
    """Arguments: address, clients, tokens of each; prints the number of tokens that each was sent."""
    url, clients, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(lambda client: read(url, client, new_tokens), range(clients)))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()

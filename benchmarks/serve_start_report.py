"""Measures how long a server takes to start: from the command to the first /health that says ok and the first token.

    python benchmarks/serve_start_report.py MODEL --rounds 5
    python benchmarks/serve_start_report.py MODEL --root /path/to/before --root .

Each start is a process of its own. The first one of each source tree is not counted: it packs the model and compiles
kernels. With several trees (--root) their starts alternate, so that both meet the same phases of the machine. Run it
alone: half of a start is Python's imports, which other programs slow down.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

LOOK_SECONDS = 0.05
"""Between two looks at /health, which the server answers beside its start."""
PATIENCE_SECONDS = 1800.0
"""For a first start, which packs the model."""
HEAD = """{model}, {rounds} starts each, in turn, on {cpu}, {cores} CPUs; medians (least to most).

| sources | first /health that says ok | first token | CPU time |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds from the command on. cpu_s: of the process, until it ended."""

    health_s: float
    token_s: float
    cpu_s: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model directory, pack or GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path, action="append", help="a source tree of HybriMoE; several are compared")
    parser.add_argument("--arguments", default="--accelerator none", help="further ones of `hybrimoe serve`")
    given = parser.parse_args()
    roots = given.root or [Path(__file__).parents[1]]
    for root in roots:
        start(root, given.model, given.arguments.split())
    starts: dict[Path, list[Start]] = {root: [] for root in roots}
    for number in range(given.rounds):
        for root in roots if number % 2 == 0 else reversed(roots):
            starts[root].append(start(root, given.model, given.arguments.split()))
    print(HEAD.format(model=given.model, rounds=given.rounds, cpu=cpu(), cores=os.cpu_count()))
    for root, found in starts.items():
        columns = [spread([getattr(one, name) for one in found]) for name in Start.__dataclass_fields__]
        print(f"| {root} | {' | '.join(columns)} |")


def start(root: Path, model: str, arguments: list[str]) -> Start:
    """Starts a server, waits for its health, asks it for a token, and ends it. Raises RuntimeError where it fails."""
    port, before_s = free_port(), children_s()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root.resolve()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "hybrimoe", "serve", str(model), "--port", str(port), *arguments]
    begun = time.monotonic()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not healthy(port):
                if process.poll() is not None or time.monotonic() - begun > PATIENCE_SECONDS:
                    raise RuntimeError(f"{' '.join(command)} did not start: {process.communicate()[1]}")
                time.sleep(LOOK_SECONDS)
            health_s = time.monotonic() - begun
            asked = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
            ask(f"http://127.0.0.1:{port}/v1/completions", asked)
            token_s = time.monotonic() - begun
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate()
    return Start(health_s, token_s, children_s() - before_s)


def healthy(port: int) -> bool:
    """Whether the server says that its model is there."""
    try:
        return bool(ask(f"http://127.0.0.1:{port}/health")["status"] == "ok")
    except (OSError, urllib.error.URLError):
        return False


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer to a request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def children_s() -> float:
    """CPU time of the processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def spread(values: list[float]) -> str:
    """Median, least and most, in seconds."""
    return f"{median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def cpu() -> str:
    """The machine, in words."""
    from hybrimoe.machine.facts import cpu_model

    return cpu_model()


if __name__ == "__main__":
    main()

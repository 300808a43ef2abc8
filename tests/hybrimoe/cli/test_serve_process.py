"""`hybrimoe serve` as a process of its own: it listens before the model is there, and ends as it is asked to. (A server
that is started as users start it: `tests/hybrimoe/cli/test_bench_serve.py`.)"""

import contextlib
import json
import os
import signal
import threading
import time

import httpx
import pytest

from hybrimoe.config.deploy import ServerConfig
from tests.forked import HANG_SECONDS, HYBRIMOE, Forked

DRAIN_SECONDS = ServerConfig().drain_seconds
LONG = {"prompt": "It was", "max_tokens": 1500, "temperature": 1, "seed": 1, "ignore_eos": True}

SLOW_MODEL = """
import time
from hybrimoe.cli.app import main
from hybrimoe.generation.engine import TextGenerator
forward = TextGenerator.forward
def slowly(*args):
    time.sleep(0.05)
    return forward(*args)
TextGenerator.forward = slowly
main()
"""
"""A server with a model whose steps take so long that a LONG reply is under way for more than a minute."""


class Server:
    """A running server, its address, and what it said on stderr when it has ended."""

    def __init__(self, *words, environment=None, program=HYBRIMOE):
        environment = {**os.environ, **(environment or {})}
        self.process = Forked(program, "serve", "--port", "0", "--json", *words, environment=environment)
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.rstrip() == "}":
                break
        self.told = json.loads("".join(lines))
        self.url = self.told["url"]

    def post(self, body, path="/v1/completions", **more):
        return httpx.post(f"{self.url}{path}", json=body, timeout=HANG_SECONDS, **more)

    def waits(self):
        return httpx.get(f"{self.url}/health", timeout=HANG_SECONDS).json()["waiting"]

    def signal(self, number):
        self.process.send_signal(number)

    def ended(self):
        """Exit code, and stderr."""
        _, said = self.process.communicate()
        return self.process.returncode, said


@pytest.fixture
def serve():
    servers = []

    def start(*words, **more):
        servers.append(Server(*words, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.process.close()


def in_threads(n, work):
    results = [None] * n

    def run(at):
        with contextlib.suppress(httpx.HTTPError):
            results[at] = work()

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(n)]
    for thread in threads:
        thread.start()
    return results, threads


def until(condition):
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def begun():
    """Opens a stream of a server and gives its lines, once the first text is there; closed when the test ends."""
    with contextlib.ExitStack() as opened:

        def begin(server, **more):
            client = opened.enter_context(httpx.Client(timeout=HANG_SECONDS))
            body = {**LONG, **more, "stream": True}
            response = opened.enter_context(client.stream("POST", f"{server.url}/v1/completions", json=body))
            lines = response.iter_lines()
            opened.callback(lines.close)  # lines that nobody holds would close the connection, and end the reply
            next(lines)
            return lines

        yield begin


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_refuses_what_waits_and_gives_the_reply_under_way_its_time(serve, begun, number):
    server = serve("--drain-seconds", "0.5", "--parallel", "1", program=SLOW_MODEL)
    lines = begun(server)
    results, threads = in_threads(4, lambda: server.post(LONG))
    until(lambda: server.waits() == 4)
    started = time.monotonic()
    server.signal(number)
    rest = [line for line in lines if line]
    for thread in threads:
        thread.join()
    code, said = server.ended()
    took = time.monotonic() - started
    assert code == 0, said
    assert [answer.status_code for answer in results] == [503] * 4
    assert {answer.json()["error"]["code"] for answer in results} == {"shutting_down"}
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert took < DRAIN_SECONDS, "the time that was given, and not that without the option"
    assert "Traceback" not in said


def test_a_reply_that_ends_within_the_time_is_complete(serve, begun):
    server = serve()
    lines = begun(server, max_tokens=60)
    server.signal(signal.SIGTERM)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.ended()[0] == 0


def test_a_second_signal_ends_the_server_at_once(serve, begun):
    server = serve("--drain-seconds", "600", program=SLOW_MODEL)
    begun(server)
    server.signal(signal.SIGTERM)
    until(lambda: not answers(f"{server.url}/health"))
    server.signal(signal.SIGTERM)
    code, _ = server.ended()
    assert code == 128 + signal.SIGTERM


def test_ipv6_keys_name_and_the_access_log(serve, tmp_path):
    config = tmp_path / "deploy.yaml"
    (tmp_path / "keys").write_text("from-file\n\n", encoding="utf-8")
    config.write_text("server: {host: '::1', name: mine, api_key_file: keys, cors_origins: ['https://a.example']}\n")
    server = serve("--config", str(config), environment={"HYBRIMOE_API_KEY": "from-environment"})
    assert server.url.startswith("http://[::1]:")
    assert server.told["model"] == "mine"
    body = {"prompt": "a secret", "max_tokens": 1}
    assert server.post(body).status_code == 401
    for key in ("from-file", "from-environment"):
        answer = server.post(body, headers={"authorization": f"Bearer {key}", "origin": "https://a.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
    server.signal(signal.SIGINT)
    code, said = server.ended()
    assert code == 0
    assert "POST /v1/completions 200" in said
    assert "POST /v1/completions 401" in said
    assert "secret" not in said


def test_it_listens_and_says_so_while_the_model_is_loaded():
    port = free_port()
    with Forked(SLOW_START, str(port)) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/health"))
        health = httpx.get(f"{url}/health", timeout=HANG_SECONDS)
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        refused = httpx.post(f"{url}/v1/completions", json=LONG, timeout=HANG_SECONDS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("{")
        until(lambda: httpx.get(f"{url}/health", timeout=HANG_SECONDS).status_code == 200)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 0


SLOW_START = """
import sys
from hybrimoe.cli.shared import opening
opened = opening.open_model
def slowly(*args, **kwargs):
    sys.stdin.readline()
    return opened(*args, **kwargs)
opening.open_model = slowly
from hybrimoe.cli.app import app
app(["serve", "--port", sys.argv[1], "--json"])
"""


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def answers(url):
    try:
        httpx.get(url, timeout=HANG_SECONDS)
    except httpx.HTTPError:
        return False
    return True

"""A tiny model behind the application, and ways to send it requests: as a client does, or message by message."""

import asyncio
import contextlib
import json

import httpx
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.generation import TextGenerator
from hybrimoe.runtime.layer_call.stats import Counters
from hybrimoe.server.app import create_app
from hybrimoe.server.served import Served

CONTEXT = 512
COUNTERS = tuple(Counters().as_dict())
UNIT = {"name": "emulated", "n_slots": 6, "n_layers": 2, "total": dict.fromkeys(COUNTERS, 2.5)}


@pytest.fixture(scope="module")
def generator():
    tokenizer = load_tokenizer(None)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return TextGenerator(Qwen3MoeForCausalLM(config).eval(), tokenizer)


@pytest.fixture
def application(generator):
    """Makes applications of the model: `application(**settings)` gives one and its `Served`."""
    opened = []

    def make(loaded=True, **settings):
        own = {
            name: settings.pop(name)
            for name in (
                "queue_length",
                "parallel",
                "max_stall_ms",
                "tool_parser",
                "max_reply_s",
                "prefix_cache",
                "slot_files",
            )
            if name in settings
        }
        served = Served("tiny", **own)
        if loaded:
            served.open(generator, lambda: {"total": dict.fromkeys(COUNTERS, 5.0), "accelerators": [UNIT, UNIT]})
        opened.append(served)
        return create_app(served, **settings), served

    yield make
    for served in opened:
        served.close()


@contextlib.asynccontextmanager
async def client_of(app):
    """An HTTP client of the application. What leaves the application as an exception would cut a connection."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


@pytest.fixture
def call(application):
    """`call(method, path, body)` sends a request to an application, `call.together` several at once."""
    return _calling(application()[0])


@pytest.fixture
def strict_call(application):
    """As `call`, of a server that refuses unknown fields."""
    return _calling(application(strict=True)[0])


@pytest.fixture
def calling():
    """Makes such a `call` of an application."""
    return _calling


def _calling(app):
    def together(*requests):
        async def run():
            async with client_of(app) as client:
                return await asyncio.gather(
                    *(client.request(method, path, **_content(*body)) for method, path, *body in requests)
                )

        return asyncio.run(run())

    def one(*words):
        return together(words)[0]

    one.together = together
    return one


def _content(body=None):
    """JSON as Python writes it: half surrogates and NaN as a careless client sends them. Bytes are sent as they are."""
    if body is None:
        return {}
    content = body if isinstance(body, bytes) else json.dumps(body)
    return {"content": content, "headers": {"content-type": "application/json"}}


class Connection:
    """One request, message by message. `left` makes the client close the connection."""

    def __init__(self, app, path, body):
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
            "server": ("x", 80),
        }  # fmt: skip
        self.app, self.body = app, json.dumps(body).encode()
        self.left, self.sent = asyncio.Event(), asyncio.Queue()
        self.read = False

    async def receive(self):
        if not self.read:
            self.read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def run(self):
        """The application's side, until it is done with the request."""
        await self.app(self.scope, self.receive, self.sent.put)


@pytest.fixture
def client():
    return client_of


@pytest.fixture
def connect():
    return Connection

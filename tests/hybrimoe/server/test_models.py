"""Several models of a server, of which one is in memory: who waits, who is let go, what is told of them."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest

from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation import TextGenerator
from hybrimoe.server.app import create_app
from hybrimoe.server.models import Loadable, Models
from hybrimoe.server.served import Served

PROMPT = {"prompt": "It was", "max_tokens": 3, "temperature": 0}
WAIT_SECONDS = 60  # no machine is as slow: what takes so long hangs


class Opened:
    """A model in memory of its own, though its weights are shared by the tests."""

    def __init__(self, generator):
        self.generator = TextGenerator(generator.model, generator.tokenizer)

    def stats(self):
        return None


class Shelf:
    """Models that know when they are in memory, and can be kept from getting there."""

    def __init__(self, generator):
        self.generator = generator
        self.events, self.in_memory, self.most = [], 0, 0
        self.gates, self.opened = {}, []

    def loadable(self, name):
        @contextlib.contextmanager
        def open_it():
            gate = self.gates.get(name)
            if isinstance(gate, Exception):
                raise gate
            if gate is not None:
                assert gate.wait(WAIT_SECONDS)
            self.in_memory += 1
            self.most = max(self.most, self.in_memory)
            self.events.append(f"+{name}")
            opened = Opened(self.generator)
            self.opened.append(weakref.ref(opened.generator))
            try:
                yield opened
            finally:
                self.in_memory -= 1
                self.events.append(f"-{name}")

        return Loadable(open_it, lambda: Served(name), f"/models/{name}")


@pytest.fixture
def shelf(generator):
    return Shelf(generator)


@pytest.fixture
def models(shelf):
    made = []

    def make(*names, start=None, **settings):
        made.append(Models({name: shelf.loadable(name) for name in names}, **settings))
        made[-1].start(start)
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def asking(calling):
    """`asking(models)` gives `call`, as for a single model."""
    return lambda models: calling(create_app(models))


async def until(condition):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def settled(condition):
    asyncio.run(until(condition))


def test_a_request_loads_the_model_that_it_names_and_the_other_one_leaves(models, asking, shelf, call):
    both = models("a", "b", start="a")
    ask = asking(both)
    expected = call("POST", "/v1/completions", PROMPT).json()["choices"][0]["text"]
    answers = [ask("POST", "/v1/completions", {**PROMPT, "model": name}).json() for name in ("a", "b", "b:latest", "a")]
    assert [answer["model"] for answer in answers] == ["a", "b", "b", "a"]
    assert {answer["choices"][0]["text"] for answer in answers} == {expected}
    assert shelf.events == ["+a", "-a", "+b", "-b", "+a"]
    assert shelf.most == 1
    assert ask("POST", "/v1/completions", PROMPT).json()["model"] == "a", "without a name: the one in memory"
    told = {card["id"]: card["state"] for card in ask("GET", "/v1/models").json()["data"]}
    assert told == {"a": "loaded", "b": "unloaded"}
    assert ask("GET", "/health").json()["models"] == told
    assert 'hybrimoe_model_loaded{model="a"} 1.0' in ask("GET", "/metrics").text
    gc.collect()
    assert [one() is None for one in shelf.opened] == [True, True, False], "nothing holds what has left"


def test_without_a_start_nothing_is_loaded_until_it_is_asked_for(models, asking, shelf):
    ask = asking(models("a", "b"))
    assert ask("GET", "/health").status_code == 200
    assert ask("GET", "/slots").status_code == 503
    assert ask("POST", "/api/show", {"model": "b"}).json()["capabilities"]
    assert shelf.events == []
    assert ask("POST", "/tokenize", {"content": "It", "model": "b"}).status_code == 200
    assert ask("GET", "/slots").status_code == 200
    assert ask("GET", "/props").json()["model_path"] == "/models/b"
    assert shelf.events == ["+b"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/api/chat", "/v1/messages", "/api/show"])
def test_an_unknown_name_is_answered_with_the_known_ones(models, asking, path):
    body = {"model": "c", "prompt": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    answer = asking(models("a", "b"))("POST", path, body)
    assert answer.status_code == 404
    assert "'a', 'b'" in answer.text
    assert "'c'" in answer.text


def test_a_model_leaves_only_when_its_replies_have_ended_and_nobody_starves(models, shelf, client, generator):
    """Requests for the model in memory that come after one for another wait behind it."""
    go, forward = threading.Semaphore(0), TextGenerator.forward

    def stepwise(self, *args):
        assert go.acquire(timeout=WAIT_SECONDS)
        return forward(self, *args)

    async def run():
        both = models("a", "b", start="a")
        order = []
        async with client(create_app(both)) as http:

            async def ask(name):
                answer = await http.post("/v1/completions", json={**PROMPT, "model": name}, timeout=WAIT_SECONDS)
                order.append(name)
                return answer

            first = asyncio.create_task(ask("a"))
            await until(lambda: both.n_running == 1)
            second = asyncio.create_task(ask("b"))
            await until(lambda: both.n_waiting_for_model == 1)
            third = asyncio.create_task(ask("a"))
            await until(lambda: both.n_waiting_for_model == 2)
            assert (shelf.events, both.states["a"]) == (["+a"], "loaded"), "its reply is under way"
            go.release(1_000)
            answers = await asyncio.gather(first, second, third)
        return answers, order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGenerator, "forward", stepwise)
        answers, order = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [200] * 3
    assert order == ["a", "b", "a"]
    assert shelf.events == ["+a", "-a", "+b", "-b", "+a"]


def test_a_client_that_leaves_while_its_model_is_loaded_is_forgotten(models, shelf, connect):
    shelf.gates["b"] = threading.Event()

    async def run():
        both = models("a", "b", start="a")
        one = connect(create_app(both), "/v1/completions", {**PROMPT, "model": "b"})
        task = asyncio.create_task(one.run())
        await until(lambda: both.states["b"] == "loading")
        one.left.set()
        await task
        assert both.n_waiting_for_model == 0
        shelf.gates["b"].set()
        await until(lambda: both.states["b"] == "loaded")
        await until(lambda: both._entries["b"].n_using == 0)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_told_and_the_others_go_on(models, asking, shelf):
    ask = asking(models("a", "b", start="a"))
    shelf.gates["b"] = ModelError("its weights are damaged")
    answer = ask("POST", "/v1/completions", {**PROMPT, "model": "b"})
    assert answer.status_code == 500
    assert "'b' cannot be loaded: its weights are damaged" in answer.json()["error"]["message"]
    assert ask("GET", "/health").json()["models"] == {"a": "unloaded", "b": "failed"}
    assert ask("POST", "/v1/completions", {**PROMPT, "model": "a"}).status_code == 200
    del shelf.gates["b"]
    assert ask("POST", "/v1/completions", {**PROMPT, "model": "b"}).status_code == 200, "it is tried again"


def test_too_many_and_too_late_are_429(models, shelf, client):
    shelf.gates["b"] = threading.Event()

    async def run():
        both = models("a", "b", max_waiting=1, max_wait_s=0.05)
        async with client(create_app(both)) as http:
            late = asyncio.create_task(http.post("/v1/completions", json={**PROMPT, "model": "b"}))
            await until(lambda: both.n_waiting_for_model == 1)
            full = await http.post("/v1/completions", json={**PROMPT, "model": "b"})
            return full, await late

    full, late = asyncio.run(run())
    shelf.gates["b"].set()
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert (late.status_code, late.json()["error"]["code"]) == (429, "waited_too_long")


def test_a_model_leaves_after_the_idle_time_and_comes_again(models, asking, shelf):
    one = models("a", start="a", idle_unload_s=0.05)
    settled(lambda: shelf.events == ["+a", "-a"])
    assert asking(one)("POST", "/v1/completions", PROMPT).status_code == 200
    settled(lambda: shelf.events == ["+a", "-a"] * 2)


def test_ollamas_keep_alive_says_how_long_a_model_stays(models, asking, shelf):
    ask = asking(models("a", "b", start="a"))
    chat = {
        "model": "a",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": False,
        "options": {"num_predict": 1},
    }
    assert [card["name"] for card in ask("GET", "/api/tags").json()["models"]] == ["a:latest", "b:latest"]
    assert ask("GET", "/api/ps").json()["models"][0]["expires_at"].startswith("9999")
    ask("POST", "/api/chat", {**chat, "keep_alive": "1h30m"})
    (loaded,) = ask("GET", "/api/ps").json()["models"]
    assert loaded["name"] == "a:latest"
    assert not loaded["expires_at"].startswith("9999")
    ask("POST", "/api/chat", {**chat, "keep_alive": -1})
    assert ask("GET", "/api/ps").json()["models"][0]["expires_at"].startswith("9999")
    let_go = ask("POST", "/api/generate", {"model": "a", "keep_alive": 0}).json()
    assert let_go["done_reason"] == "unload"
    settled(lambda: shelf.events == ["+a", "-a"])
    assert ask("GET", "/api/ps").json() == {"models": []}
    assert ask("POST", "/api/generate", {"model": "b"}).json()["done_reason"] == "load"
    assert shelf.events == ["+a", "-a", "+b"]
    refused = ask("POST", "/api/generate", {"model": "b", "keep_alive": "soon"})
    assert refused.status_code == 400
    assert "5m" in refused.json()["error"]


@pytest.mark.parametrize("duration", ["99999999999h", "9" * 400 + "h", 1e300, 1e12])
def test_a_duration_that_no_clock_holds_is_for_ever_and_the_server_goes_on(models, asking, shelf, duration):
    ask = asking(models("a", "b", start="a"))
    assert ask("POST", "/api/generate", {"model": "a", "keep_alive": duration}).status_code == 200
    assert ask("GET", "/api/ps").json()["models"][0]["expires_at"].startswith("9999")
    assert ask("POST", "/v1/completions", {**PROMPT, "model": "b"}).status_code == 200, "models are still exchanged"
    assert shelf.events == ["+a", "-a", "+b"]


def test_the_end_refuses_those_who_wait_for_their_model(models, shelf, client):
    shelf.gates["b"] = threading.Event()

    async def run():
        both = models("a", "b", start="a")
        async with client(create_app(both)) as http:
            waits = asyncio.create_task(http.post("/v1/completions", json={**PROMPT, "model": "b"}))
            await until(lambda: both.states["b"] == "loading")
            both.drain(0.0)
            refused, later = await waits, await http.post("/v1/completions", json=PROMPT)
        shelf.gates["b"].set()
        return refused, later

    refused, later = asyncio.run(run())
    assert refused.status_code == later.status_code == 503


class TestDeployments:
    """`server.models` as the deployments that come of it."""

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text('{"model_type": "qwen3_moe"}')
            (tmp_path / name / "model.safetensors").write_bytes(b"")
        (tmp_path / "notes").mkdir()
        return tmp_path

    def test_a_folder_a_list_and_the_own_model(self, folder):
        from hybrimoe.config.deploy import load_config
        from hybrimoe.server.shelf import deployments

        of_folder = deployments(load_config({"server": {"models": str(folder)}}))
        assert {name: one.model for name, one in of_folder.items()} == {
            "first": str(folder / "first"), "second": str(folder / "second"),
        }  # fmt: skip
        listed = {"coder": {"model": str(folder / "first"), "cpu": {"expert_dtype": "int8"}, "server": {"parallel": 2}}}
        config = load_config(
            {"model": str(folder / "second"), "cpu": {"threads": 3}, "server": {"name": "big", "models": listed}}
        )
        both = deployments(config)
        assert list(both) == ["big", "coder"]
        assert both["big"] is config
        assert both["coder"].cpu.expert_dtype == "int8"
        assert both["coder"].cpu.threads == 3, "the rest is the deployment's"
        assert both["coder"].server.parallel == 2
        assert list(deployments(load_config({}))) == ["demo"]

    @pytest.mark.parametrize(
        ("models", "words"),
        [
            ("nowhere", "no folder nowhere"),
            ({"x": {"cpu": {"threads": 1}}}, "x: expected the key model"),
            ({"x": {"model": "FIRST", "cpu": {"thread": 1}}}, "did you mean"),
            ({"x": "nowhere"}, "x: no model directory nowhere"),
            ({"x": {"model": "FIRST", "server": {"models": "y"}}}, "none of its own"),
            ({"demo-name": "FIRST"}, "two models have the name"),
            ({}, "found none"),
        ],
    )
    def test_a_mistake_is_named(self, folder, models, words):
        from hybrimoe.config.deploy import load_config
        from hybrimoe.server.shelf import deployments

        first = str(folder / "first")
        if isinstance(models, dict):
            models = {
                name: first if one == "FIRST" else {**one, "model": first} if "FIRST" in str(one) else one
                for name, one in models.items()
            }
        own = {"model": first, "server": {"name": "demo-name", "models": models}}
        given = own if "two models" in words else {"server": {"models": models}}
        with pytest.raises(ConfigError, match=words):
            deployments(load_config(given))

    def test_paths_are_meant_from_the_files_folder(self, folder):
        from hybrimoe.config.deploy import load_config

        file = folder / "deploy.yaml"
        file.write_text("server:\n  models:\n    a: first\n    b: {model: second}\n")
        assert load_config(file).server.models == {
            "a": str(folder / "first"), "b": {"model": str(folder / "second")},
        }  # fmt: skip

"""What is told of a model while it runs, and what can be changed: a small mixture on the emulated accelerator."""

import asyncio
import contextlib
import copy
import io
import json
import logging
import socket
import sys
import threading
from types import SimpleNamespace

import jsonschema
import pytest
import torch
import uvicorn
from transformers import Qwen3MoeForCausalLM
from typer.testing import CliRunner

import hybrimoe
from hybrimoe.cli.app import app as program
from hybrimoe.errors import BudgetError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.generation.growing import LEAST_ROOM
from hybrimoe.runtime.budgets import Resized, ResizeError
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.server import http
from hybrimoe.server.app import create_app
from hybrimoe.server.live.state import offered_beside
from hybrimoe.server.models import Loadable, Models, Progress
from hybrimoe.server.served import Served

REPLY = {"prompt": "It was", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
N_SLOTS = 4


@pytest.fixture(scope="module")
def injected(generator):
    model = copy.deepcopy(generator.model)
    with hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=N_SLOTS, expert_dtype="float32"):
        yield TextGenerator(model, generator.tokenizer)


@pytest.fixture
def served(injected):
    """A server of the model; its slots and policy are as at the start again afterwards."""
    served = Served("tiny", parallel=2)
    served.open(injected, lambda: injected.model.hybrimoe.stats().as_dict())
    yield served
    served.close()
    session = injected.model.hybrimoe.session
    session.resize_slots(N_SLOTS)
    session.change_policy(RuntimeConfig().policy)


@pytest.fixture
def ask(served, calling):
    """As `call`, of that server."""
    return calling(create_app(served))


def test_the_state_counts_what_ran(ask):
    before = ask("GET", "/hybrimoe/state").json()
    assert (before["status"], before["loading"], before["requests"]["parallel"]) == ("ok", None, 2)
    ask("POST", "/v1/completions", REPLY)
    after = ask("GET", "/hybrimoe/state").json()
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == REPLY["max_tokens"]
    assert after["time_s"] > before["time_s"]
    experts = after["experts"]
    assert (experts["n_layers"], experts["n_experts"], experts["n_slots"]) == (2, 8, N_SLOTS)
    assert experts["activated"] > before["experts"]["activated"] + REPLY["max_tokens"]
    assert 0 < experts["hits"] < experts["activated"]
    assert [lane["name"] for lane in experts["lanes"]] == ["cpu", "accel", "link"]
    assert all(lane["busy_us"] > 0 for lane in experts["lanes"])
    memory = {tier["name"]: tier["bytes"] for tier in after["memory"]}
    assert memory["slots"] * 2 == memory["experts"] > 0
    assert memory["process"] > memory["keys_and_values"] > 0


def test_tokens_are_counted_while_a_reply_is_under_way(served, calling):
    together = calling(create_app(served)).together
    counted = []

    async def look():
        while True:
            counted.append(served.running_worker.n_generated)
            await asyncio.sleep(0.005)

    async def run():
        looking = asyncio.ensure_future(look())
        await asyncio.to_thread(together, ("POST", "/v1/completions", REPLY), ("POST", "/v1/completions", REPLY))
        looking.cancel()

    asyncio.run(run())
    assert counted == sorted(counted)
    assert len(set(counted)) > 5


def test_the_map_of_experts_shows_the_slots(ask, injected):
    ask("POST", "/v1/completions", REPLY)
    layers = ask("GET", "/hybrimoe/experts").json()["layers"]
    assert [layer["path"] for layer in layers] == [spec.path for spec in injected.model.hybrimoe.session.layer_specs()]
    assert sorted(slot for layer in layers for slot in layer["slots"] if slot >= 0) == list(range(N_SLOTS))
    assert all(sum(layer["uses"]) >= 2 * REPLY["max_tokens"] for layer in layers)


def test_policy_and_slots_change_while_replies_go_on(served, calling):
    call = calling(create_app(served))
    alone = call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    answers = call.together(
        ("POST", "/v1/completions", REPLY),
        ("POST", "/hybrimoe/settings", {"policy": "hybrimoe/none/lru", "slots": 6}),
        ("POST", "/v1/completions", REPLY),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    experts = answers[1].json()["experts"]
    assert (experts["policy"], experts["n_slots"]) == ("hybrimoe/none/lru", 6)
    assert {answer.json()["choices"][0]["text"] for answer in answers[::2]} == {alone}


def test_slots_may_go_and_come_back(ask):
    without = ask("POST", "/hybrimoe/settings", {"slots": 0}).json()
    assert (without["experts"]["n_slots"], without["switches"]["policies"]) == (0, [])
    assert [lane["name"] for lane in without["experts"]["lanes"]] == ["cpu"]
    assert ask("GET", "/hybrimoe/experts").json() == {"layers": []}
    assert "no expert has a slot" in ask("POST", "/hybrimoe/settings", {"policy": "static"}).json()["error"]["message"]
    assert ask("POST", "/hybrimoe/settings", {"slots": 5}).json()["experts"]["n_slots"] == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "expected policy"),
        ({"policy": "oracel"}, "oracle"),
        ({"policy": "oracle"}, "future"),
        ({"slots": -1}, "slots"),
        ({"host_memory": "1GiB"}, "all experts are in host memory"),
        ({"kv": "1B"}, "the keys and values of one token take"),
        ({"kv": "500TiB"}, "is more than cpu has left: give"),
        ({"kv": "many"}, "expected a size"),
        ({"parallel": 0}, "parallel"),
    ],
)
def test_what_cannot_be_changed_is_refused_and_nothing_changes(ask, asked, said):
    answer = ask("POST", "/hybrimoe/settings", asked)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    experts = ask("GET", "/hybrimoe/state").json()["experts"]
    assert (experts["policy"], experts["n_slots"]) == ("ours", N_SLOTS)


def test_what_is_offered_can_plan():
    offered = offered_beside("ours")
    assert "oracle" not in offered
    assert {"ours", "hybrimoe", "static", "fiddler"} <= set(offered)
    assert offered_beside("a/b/c")[0] == "a/b/c"


def test_a_step_is_recorded_and_explained(served, calling, injected):
    call = calling(create_app(served))
    reply, step = call.together(("POST", "/v1/completions", REPLY), ("POST", "/hybrimoe/step"))
    assert reply.json()["choices"][0]["text"] == call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    found = step.json()
    assert (found["kind"], found["n_tokens"], len(found["layers"])) == ("emulated", 1, 2)
    for layer in found["layers"]:
        ran = {(task["expert"], task["lane"]) for task in found["tasks"]
               if task["layer"] == layer["layer"] and task["kind"].endswith("_expert")}  # fmt: skip
        assert ran == {(one["expert"], one["lane"]) for one in layer["decisions"]}
        assert layer["alternatives"] == sorted(layer["alternatives"], key=lambda one: one["makespan_us"])
    assert min(task["start_us"] for task in found["tasks"]) == 0
    assert max(task["end_us"] for task in found["tasks"]) == pytest.approx(found["us"])
    assert not injected.model.hybrimoe.session._runner.experts.tracing


def test_without_a_reply_no_step_is_recorded(ask, monkeypatch):
    monkeypatch.setattr("hybrimoe.server.live.step.MOST_SECONDS", 0.05)
    answer = ask("POST", "/hybrimoe/step")
    assert (answer.status_code, "no token came" in answer.json()["error"]["message"]) == (400, True)


def test_the_answers_are_as_documented(ask):
    document = ask("GET", "/openapi.json").json()
    for method, path, *body in (
        ("get", "/hybrimoe/state"), ("get", "/hybrimoe/experts"), ("post", "/hybrimoe/settings", {"slots": 3}),
    ):  # fmt: skip
        answer = ask(method.upper(), path, *body)
        schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})


def test_a_model_that_is_being_loaded_says_how_far_it_is(calling, injected):
    progress, told, go = Progress(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def loads():
        progress.tell(3, 10, "packing experts")
        told.set()
        assert go.wait(60)
        yield SimpleNamespace(generator=injected, stats=lambda: None)

    models = Models({"slow": Loadable(loads, lambda: Served("slow"), progress=progress)})
    loading = threading.Thread(target=models.start, args=("slow",))
    loading.start()
    try:
        assert told.wait(60)
        call = calling(create_app(models))
        state = call("GET", "/hybrimoe/state").json()
        assert (state["status"], state["models"], state["experts"]) == ("loading", {"slow": "loading"}, None)
        assert state["loading"] == {"done": 3, "total": 10, "what": "packing experts"}
        assert call("POST", "/hybrimoe/settings", {"slots": 1}).status_code == 503
        refused = call("POST", "/slots/0?action=erase")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert "is being loaded" in refused.json()["error"]["message"]
        go.set()
        loading.join()
        assert call("GET", "/hybrimoe/state").json()["loading"] is None
    finally:
        go.set()
        loading.join()
        models.close()


def test_a_model_without_experts_of_ours_has_nothing_to_change(call):
    state = call("GET", "/hybrimoe/state").json()
    assert (state["experts"], state["switches"]) == (None, {"policies": [], "most_slots": None})
    assert call("POST", "/hybrimoe/settings", {"slots": 1}).status_code == 400


def test_an_errand_that_fails_is_told_and_the_thread_goes_on(served):
    worker = served.running_worker

    def fails():
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        worker.between_steps(fails).result(timeout=60)
    assert worker.between_steps(lambda: 7).result(timeout=60) == 7


# Keys and values ------------------------------------------------------------------------------------------------------


def test_memory_for_keys_and_values_changes_while_replies_go_on(served, calling):
    call = calling(create_app(served))
    alone = call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    generator, engine = served.engine.generator, served.engine
    planned = max(LEAST_ROOM, len(generator.encode(REPLY["prompt"])) + REPLY["max_tokens"]) * generator.token_bytes()
    sizes = (planned - 1, planned, 4 * planned, planned)
    answers = call.together(
        ("POST", "/v1/completions", REPLY), *(("POST", "/hybrimoe/settings", {"kv": f"{size}B"}) for size in sizes)
    )
    assert answers[0].json()["choices"][0]["text"] == alone
    assert [answer.status_code for answer in answers[2:]] == [200] * 3
    if answers[1].status_code == 400:  # it came while the reply was under way
        assert f"give {planned}B" in answers[1].json()["error"]["message"]
    memory = {tier["name"]: tier for tier in call("GET", "/hybrimoe/state").json()["memory"]}
    assert memory["keys_and_values"]["of_bytes"] == generator.kv_bytes == planned
    assert engine.kv_bytes <= planned, "memory of replies that have ended was given back"
    assert call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"] == alone
    too_long = call("POST", "/v1/completions", REPLY | {"prompt": "It was " * 200}).json()
    assert "memory for keys and values" in too_long["error"]["message"]
    assert call("POST", "/hybrimoe/settings", {"kv": "auto"}).status_code == 200
    generator.kv_bytes = None


def test_what_replies_under_way_need_is_not_taken(injected):
    engine = BatchEngine(injected, parallel=2)
    options = SamplingOptions(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    prompt = injected.encode("It was a bright morning")
    wanted = "".join(injected.reply(prompt, options))
    engine.resize_kv("64MiB")
    first, second = (engine.admit(prompt, options, lambda: False) for _ in range(2))
    least = 2 * max(LEAST_ROOM, len(prompt) + 40) * injected.token_bytes()
    texts = {first: "", second: ""}
    for number in range(80):
        if number == 5:
            with pytest.raises(BudgetError, match="2 replies are under way: give 2 or more"):
                engine.resize_parallel(1)
            engine.resize_parallel(3)
            assert engine.has_room(prompt, options)
            engine.resize_parallel(2)
            assert not engine.has_room(prompt, options)
            with pytest.raises(BudgetError, match=rf"2 replies under way have room for: give {least}B"):
                engine.resize_kv(f"{least - 1}B")
            assert injected.kv_bytes == 64 << 20
            assert engine.resize_kv(f"{least}B") == least
        for progress in engine.step():
            texts[progress.reply] += progress.text
    assert texts == {first: wanted, second: wanted}
    assert not engine.n_running
    engine.resize_parallel(1)
    assert engine.admit(prompt, options, lambda: False)
    assert not engine.has_room(prompt, options)
    injected.kv_bytes = None


# Several budgets at once ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiered(generator, tmp_path, private_cache, monkeypatch):
    """A server of a model with 32 experts and a tier on disk: budgets for slots, host memory, keys and values."""
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))
    config = copy.deepcopy(generator.model.config)
    config.update({"num_hidden_layers": 4, "num_experts": 8, "layer_types": None, "initializer_range": 0.2})
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    model = hybrimoe.load(
        tmp_path / "model", accelerator="emulated", gpu_expert_slots=N_SLOTS, expert_dtype="float32", progress=False,
        memory={"host": 16, "disk": "auto"},
    )  # fmt: skip
    served = Served("tiny", parallel=2)
    served.open(TextGenerator(model, generator.tokenizer), lambda: model.hybrimoe.stats().as_dict())
    with model.hybrimoe.session:
        yield served
        served.close()


def budgets_of(served):
    session = served.engine.generator.model.hybrimoe.session
    return session.n_slots, session.stats().tier.n_slots, served.engine.generator.kv_bytes


def test_three_budgets_change_at_once_while_replies_go_on(tiered, calling):
    call = calling(create_app(tiered))
    alone = call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    answers = call.together(
        ("POST", "/v1/completions", REPLY),
        ("POST", "/hybrimoe/settings", {"slots": 2, "host_memory": "9", "kv": "1MiB"}),
        ("POST", "/hybrimoe/settings", {"slots": 6, "host_memory": "20", "kv": "2MiB", "policy": "static"}),
        ("POST", "/v1/completions", REPLY),
    )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert budgets_of(tiered) in {(6, 20, 2 << 20), (2, 9, 1 << 20)}
    assert {answer.json()["choices"][0]["text"] for answer in answers[::3]} == {alone}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"slots": 33}, "slots"),
        ({"host_memory": "1KiB"}, "host_memory"),
        ({"host_memory": "much"}, "host_memory"),
        ({"kv": "1B"}, "kv"),
        ({"kv": "500TiB"}, "kv"),
        ({"policy": "oracel"}, "policy"),
    ],
)
def test_where_one_budget_cannot_be_none_is_changed(tiered, calling, wrong, field):
    call, before = calling(create_app(tiered)), budgets_of(tiered)
    slots = call("GET", "/hybrimoe/experts").json()["layers"]
    fine = {"slots": 3, "host_memory": "12", "kv": "3MiB", "parallel": 3}
    answer = call("POST", "/hybrimoe/settings", fine | wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert answer.json()["error"]["message"].startswith(f"{field}: ")
    assert (budgets_of(tiered), tiered.engine.parallel) == (before, 2)
    assert call("GET", "/hybrimoe/experts").json()["layers"] == slots, "the slots keep what they hold"
    assert call("POST", "/hybrimoe/settings", fine).status_code == 200
    assert (budgets_of(tiered), tiered.engine.parallel) == ((3, 12, 3 << 20), 3)


def test_a_reply_that_a_disk_ends_is_told_and_the_others_go_on(tiered, calling, monkeypatch):
    call = calling(create_app(tiered))
    assert call("POST", "/hybrimoe/settings", {"host_memory": "8"}).status_code == 200
    alone = call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    assert call("GET", "/health").json()["findings"] == []

    def fails(descriptor, into, offset_bytes):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("hybrimoe.runtime.tier.reader._read_at", fails)
        ended = call("POST", "/v1/completions", REPLY | {"prompt": "Another one"})
        streamed = call("POST", "/v1/completions", REPLY | {"prompt": "A third", "stream": True})
    wrong = "cannot be read: Input/output error; check the disk"
    assert (ended.status_code, wrong in ended.json()["error"]["message"]) == (500, True)
    assert wrong in streamed.text
    health = call("GET", "/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    (disk,) = [one for one in health.json()["findings"] if one["about"] == "disk"]
    assert not disk["good"]
    assert "reads of experts have failed since the start, the latest: " in disk["text"]
    assert wrong in disk["text"]
    assert call("POST", "/v1/completions", REPLY).json()["choices"][0]["text"] == alone


def test_resize_says_what_there_is_now_and_which_budget_cannot_be(tiered):
    session, engine = tiered.engine.generator.model.hybrimoe.session, tiered.engine
    change = tiered.running_worker.between_steps
    assert change(lambda: session.resize(slots="50%", kv="1MiB")).result(60) == Resized(16, None, 1 << 20)
    with pytest.raises(ResizeError, match=r"^kv: memory\.kv: 1B is 1 bytes") as caught:
        change(lambda: session.resize(slots=2, host=9, kv="1B")).result(60)
    assert (caught.value.budget, budgets_of(tiered)) == ("kv", (16, 16, 1 << 20))

    def refused(number):
        raise BudgetError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_replace_slots", lambda slots, runner: refused(slots))
        with pytest.raises(ResizeError, match=r"^slots: no memory"):
            change(lambda: session.resize(slots=2, host=9, kv="2MiB")).result(60)
    assert budgets_of(tiered) == (16, 16, 1 << 20)
    assert engine.generator.kv_bytes == 1 << 20


# hybrimoe ctl ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(app):
    """The URL of a server that answers over a socket of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def ctl(*words, **environment):
    """Exit code and output of `hybrimoe ctl`."""
    ran = CliRunner().invoke(program, ["ctl", *words], env={"HYBRIMOE_API_KEY": None, "COLUMNS": "200"} | environment)
    return ran.exit_code, " ".join(ran.output.split())


def test_ctl_shows_and_changes_a_running_server(served, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with listening(create_app(served, api_keys=["secret"])) as url:
        code, said = ctl("status", "--url", url)
        assert (code, "asks for an API key, and no key was given: set HYBRIMOE_API_KEY" in said) == (1, True)
        assert "the given key is not one of its keys" in ctl("status", "--url", url, HYBRIMOE_API_KEY="guess")[1]
        known = {"HYBRIMOE_API_KEY": "secret"}
        code, said = ctl("status", "--url", url, "--api-key-file", str(tmp_path / "key"))
        assert (code, "tiny: loaded (server: ok)" in said, f"{N_SLOTS} slots for 8 experts" in said) == (0, True, True)
        code, said = ctl("slots", "6", "--url", url, "--json", **known)
        assert (code, json.loads(said)["experts"]["n_slots"]) == (0, 6)
        assert "policy hybrimoe; 6 slots" in ctl("policy", "hybrimoe", "--url", url.removeprefix("http://"), **known)[1]
        assert ctl("kv", "64MiB", "--url", url + "/", **known)[0] == 0
        assert "up to 5 at once" in ctl("parallel", "5", "--url", url, **known)[1]
        assert served.engine.generator.kv_bytes == 64 << 20
        served.engine.generator.kv_bytes = None
        for words, refusal in (
            (("slots", "9"), "refuses: slots: asked for 9 expert slots, but the model has 8 experts in all"),
            (("kv", "1B"), "refuses: kv: memory.kv: 1B is 1 bytes, and the keys and values of one token take"),
            (("policy", "oracel"), "refuses: policy: unknown policy 'oracel'"),
            (("host-memory", "1GiB"), "refuses: host_memory: all experts are in host memory"),
            (("load", "other"), "refuses: this server has"),
        ):
            code, said = ctl(*words, "--url", url, **known)
            assert (code, refusal in said) == (1, True), said
        assert ctl("load", "tiny", "--url", url, **known)[0] == 0


def test_a_server_logs_to_the_standard_error_of_the_moment(monkeypatch, capsys):
    former, logger = io.StringIO(), logging.getLogger("hybrimoe.server")
    monkeypatch.setattr(logger, "handlers", [])
    with monkeypatch.context() as replaced:
        replaced.setattr(sys, "stderr", former)
        http._log_to_stderr(access=False)
    former.close()
    logger.info("a line")
    assert capsys.readouterr().err.endswith("a line\n")


def test_ctl_loads_and_unloads(injected):
    @contextlib.contextmanager
    def opened():
        yield SimpleNamespace(generator=injected, stats=lambda: injected.model.hybrimoe.stats().as_dict())

    models = Models({name: Loadable(opened, lambda name=name: Served(name)) for name in ("one", "two")})
    models.start("one")
    with listening(create_app(models)) as url, contextlib.closing(models):
        assert "one: unloaded, two: loaded" in ctl("load", "two", "--url", url)[1]
        assert ctl("unload", "two", "--url", url)[0] == 0
        assert ctl("unload", "two", "--url", url)[0] == 0, "it has left already"


def test_ctl_says_what_else_is_wrong(tmp_path):
    code, said = ctl("status", "--url", "http://127.0.0.1:9")
    assert (code, "no server answers at http://127.0.0.1:9" in said, "hybrimoe serve" in said) == (1, True, True)
    assert ctl("status", "--url", "ftp://x")[0] == 2
    assert "cannot read" in ctl("status", "--api-key-file", str(tmp_path / "gone"))[1]
    (tmp_path / "empty").touch()
    assert "has no key" in ctl("status", "--api-key-file", str(tmp_path / "empty"))[1]

    async def stranger(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>another</html>"})

    with listening(stranger) as url:
        assert (
            "is no server of this version of HybriMoE: it answers '<html>another" in ctl("slots", "1", "--url", url)[1]
        )

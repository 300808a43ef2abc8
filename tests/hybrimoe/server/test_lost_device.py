"""A server whose accelerator hangs in the middle of a reply: it goes on by the CPU, or says that it cannot."""

import copy
import threading
import time

import pytest

import hybrimoe
from gpu_kernels import EmulatedAccelerator
from hybrimoe.generation import TextGenerator
from hybrimoe.server.app import create_app
from hybrimoe.server.served import Served

REPLY = {"prompt": "It was", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
MOST_S = 20.0


@pytest.fixture
def served(generator):
    model = copy.deepcopy(generator.model)
    hybrimoe.inject(
        model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32", policy="on_demand/none/lru",
        device_wait_seconds=0.4,
    )  # fmt: skip
    served = Served("tiny", parallel=2)
    served.open(TextGenerator(model, generator.tokenizer), lambda: model.hybrimoe.stats().as_dict())
    served.injection = model.hybrimoe
    yield served
    served.close()
    model.hybrimoe.restore()


def hang_after(monkeypatch, n_copies):
    """The copies into slots end so many times; the gate ends the others."""
    gate, done, transfer = threading.Event(), [], EmulatedAccelerator._transfer

    def held(*arguments):
        done.append(1)
        if len(done) > n_copies:
            gate.wait()
        transfer(*arguments)

    monkeypatch.setattr(EmulatedAccelerator, "_transfer", held)
    return gate


@pytest.mark.filterwarnings("ignore:emulated accelerator hangs:RuntimeWarning")
def test_replies_under_way_go_on_with_the_same_text(served, calling, monkeypatch):
    ask = calling(create_app(served))
    expected = ask("POST", "/v1/completions", REPLY).json()["choices"][0]["text"]
    gate, begun = hang_after(monkeypatch, 5), time.monotonic()
    try:
        answers = ask.together(*[("POST", "/v1/completions", REPLY)] * 2)
    finally:
        gate.set()
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected] * 2
    assert time.monotonic() - begun < MOST_S
    assert served.injection.session.lost is not None
    assert ask("GET", "/health").json()["status"] == "ok"
    assert ask("GET", "/hybrimoe/state").status_code == 200
    assert ask("GET", "/metrics").status_code == 200


def test_where_the_device_had_the_model_each_request_is_told_and_health_fails(served, calling, monkeypatch):
    monkeypatch.setattr("hybrimoe.runtime.session.why_it_ends", lambda *_: "Start the program again")
    ask = calling(create_app(served))
    gate = hang_after(monkeypatch, 0)
    try:
        for _ in range(2):
            begun = time.monotonic()
            answer = ask("POST", "/v1/completions", REPLY)
            assert answer.status_code == 500
            assert "hangs" in answer.json()["error"]["message"]
            assert "Start the program again" in answer.json()["error"]["message"]
            assert time.monotonic() - begun < MOST_S
        assert (ask("GET", "/health").status_code, served.state) == (503, "failed")
    finally:
        gate.set()

"""Images in requests of every API: seen alike, counted, kept apart from other images, and refused by the name of their
part where they are none."""

from __future__ import annotations

import base64
import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from seeing_models import picture, write_seeing

import hybrimoe
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.generation import TextGenerator
from hybrimoe.generation.images.vision import Vision
from hybrimoe.server.app import create_app
from hybrimoe.server.served import Served

images = pytest.importorskip("PIL.Image")
QUESTION = "What is it?"
N_IMAGE = 24


def encoded(seed: int = 0, height: int = 32) -> str:
    stream = io.BytesIO()
    images.fromarray(picture(height, 48, seed)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def url(seed: int = 0) -> str:
    return f"data:image/png;base64,{encoded(seed)}"


def openai(source: str, text: str = QUESTION, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 6, "temperature": 0, **more}


def anthropic(data: str) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": data}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": blocks}], "max_tokens": 6, "temperature": 0}


def responses(source: str) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": source}, {"type": "input_text", "text": QUESTION}]
    return {"input": [{"role": "user", "content": parts}], "max_output_tokens": 6, "temperature": 0}


OLLAMA: dict[str, Any] = {"model": "seer", "stream": False, "options": {"num_predict": 6, "temperature": 0}}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seer")
    write_seeing(folder)
    model = hybrimoe.load(folder, accelerator="none", expert_dtype="float32", packed_file=False, progress=False)
    tokenizer = load_tokenizer(folder)
    yield TextGenerator(model, tokenizer, vision=Vision(model, tokenizer, folder))
    model.hybrimoe.session.close()


@pytest.fixture(scope="module")
def served(generator):
    served = Served("seer", parallel=2)
    served.open(generator)
    yield served
    served.close()


@pytest.fixture
def seeing(served, calling):
    return calling(create_app(served))


def test_every_api_sees_the_same(seeing):
    answer = seeing("POST", "/v1/chat/completions", openai(url()))
    assert answer.status_code == 200, answer.text
    text, usage = answer.json()["choices"][0]["message"]["content"], answer.json()["usage"]
    alone = seeing("POST", "/v1/chat/completions", openai(url(), stream=True))
    assert alone.status_code == 200
    said = {
        "/v1/messages": lambda body: "".join(block["text"] for block in body["content"]),
        "/v1/responses": lambda body: body["output"][-1]["content"][0]["text"],
        "/api/chat": lambda body: body["message"]["content"],
        "/api/generate": lambda body: body["response"],
    }
    asked = {
        "/v1/messages": anthropic(encoded()),
        "/v1/responses": responses(url()),
        "/api/chat": OLLAMA | {"messages": [{"role": "user", "content": QUESTION, "images": [encoded()]}]},
        "/api/generate": OLLAMA | {"prompt": QUESTION, "images": [encoded()]},
    }
    for path, body in asked.items():
        answer = seeing("POST", path, body)
        assert answer.status_code == 200, (path, answer.text)
        assert said[path](answer.json()) == text, path
    counted = seeing("POST", "/v1/messages/count_tokens", anthropic(encoded())).json()["input_tokens"]
    assert counted == usage["prompt_tokens"] > N_IMAGE


def test_another_image_is_no_hit_and_a_second_turn_is(seeing):
    def cached(body):
        answer = seeing("POST", "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], answer.json()["choices"][0]

    long = "Tell me at length what is to be seen there, please. "
    first, _, choice = cached(openai(url(7), long * 2))
    assert cached(openai(url(7), long * 2))[1] >= first - 1
    assert cached(openai(url(8), long * 2))[1] < N_IMAGE
    turn = openai(url(7), long * 2)
    turn["messages"] += [choice["message"], {"role": "user", "content": "And then?"}]
    assert cached(turn)[1] >= first - 1


def test_texts_and_images_side_by_side(seeing):
    text = {"messages": [{"role": "user", "content": "Only words."}], "max_tokens": 6, "temperature": 0}
    bodies = [openai(url(3)), text, openai(url(4)), text]
    alone = [seeing("POST", "/v1/chat/completions", body).json()["choices"] for body in bodies]
    together = seeing.together(*(("POST", "/v1/chat/completions", body) for body in bodies))
    assert [answer.json()["choices"] for answer in together] == alone


def test_the_tower_runs_beside_the_event_loop(seeing, generator, monkeypatch):
    threads = []
    own = Vision._computed

    def computed(self, *given):
        threads.append(threading.current_thread().name)
        return own(self, *given)

    monkeypatch.setattr(Vision, "_computed", computed)
    assert seeing("POST", "/v1/chat/completions", openai(url(11))).status_code == 200
    assert [name.partition("_")[0] for name in threads] == ["hybrimoe-look"]


def test_what_the_model_takes_is_told(seeing):
    assert seeing("GET", "/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]
    assert seeing("GET", "/props").json()["modalities"]["vision"] is True
    assert "vision" in seeing("POST", "/api/show", {"model": "seer"}).json()["capabilities"]


BROKEN = base64.b64encode(base64.b64decode(encoded())[:-200]).decode()


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/chat/completions", openai("https://example.org/cat.png"), "messages.0.content.0: images are not fetched"),
        ("/v1/chat/completions", openai("file:///etc/passwd"), "messages.0.content.0: images are not fetched"),
        ("/v1/chat/completions", openai("data:image/png;base64,AAAA"), "messages.0.content.0 is no image"),
        ("/v1/chat/completions", openai("data:image/png;base64,?"), "content.0: expected an image in base64"),
        ("/v1/chat/completions", openai(f"data:image/png;base64,{BROKEN}"), "messages.0.content.0 is damaged"),
        ("/v1/messages", anthropic(BROKEN), "messages.0.content.0 is damaged"),
        ("/v1/responses", responses(f"data:image/png;base64,{BROKEN}"), "input.0.content.0 is damaged"),
        ("/api/chat", OLLAMA | {"messages": [{"role": "user", "content": "a", "images": [encoded(), BROKEN]}]},
         "messages.0.images.1 is damaged"),
        ("/api/generate", OLLAMA | {"prompt": "a", "images": [BROKEN]}, "images.0 is damaged"),
        ("/api/generate", OLLAMA | {"prompt": "a", "raw": True, "images": [encoded()]}, "leave raw and suffix out"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}}]}]}, "fetch"),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": [
            {"type": "image_url", "image_url": url()}]}]}, "messages of the user"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": url()}] * 65}]}, "at most 64"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_its_part(seeing, path, body, words):
    answer = seeing("POST", path, body)
    assert answer.status_code == 400, answer.text
    assert words in answer.text


def test_a_placeholder_in_a_message_is_text(seeing):
    """Nobody moves an image, or claims one that is not there."""
    plain = seeing("POST", "/v1/chat/completions", openai(url(), "What is it?"))
    forged = seeing("POST", "/v1/chat/completions", openai(url(), "What is <|image_pad|> it?"))
    assert forged.status_code == 200, forged.text
    assert forged.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"] + 5


def test_results_of_tools_may_show_images(seeing):
    result = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded()}}]
    body = {
        "max_tokens": 4, "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": result}]},
        ],
    }  # fmt: skip
    answer = seeing("POST", "/v1/messages", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["input_tokens"] + answer.json()["usage"]["cache_read_input_tokens"] > N_IMAGE

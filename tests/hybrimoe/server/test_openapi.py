"""The OpenAPI document against what is answered."""

import json
from threading import get_ident

import jsonschema
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from hybrimoe.server import app as app_module
from hybrimoe.server.app import create_app
from hybrimoe.server.served import Served

BODIES = {
    "/v1/completions": {"prompt": "It was", "max_tokens": 2, "logprobs": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 1,
    },
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 2}},
    "/api/generate": {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 2}, "stream": False},
    "/completion": {"prompt": "Hi", "n_predict": 2},
}  # fmt: skip


OTHERS = {
    "/tokenize": {"content": "Hi", "with_pieces": True}, "/detokenize": {"tokens": [5]}, "/api/show": {"model": "tiny"},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]}, "/infill": {"input_prefix": "a"},
}  # fmt: skip


def resolved(document, schema):
    """The schema with the document's definitions beside it, so that its references are found."""
    return {**schema, "components": document["components"]}


def check(document, path, method, response):
    told = document["paths"][path][method]["responses"]
    assert str(response.status_code) in told, (path, response.status_code, sorted(told))
    content = told[str(response.status_code)].get("content", {})
    kind = response.headers["content-type"].split(";")[0]
    assert kind in content
    if kind == "application/json":
        jsonschema.validate(response.json(), resolved(document, content[kind]["schema"]))


def test_a_start_makes_no_validators_of_answers_that_are_only_documented():
    app = create_app(Served("tiny"))
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) > len(BODIES)
    assert not any(route.response_fields for route in routes)
    told = app.openapi()["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "503"} <= told.keys()


def test_others_get_their_tokens_while_the_document_is_made(call, monkeypatch):
    threads, describe = [], app_module._document
    monkeypatch.setattr(app_module, "_document", lambda *given: threads.append(get_ident()) or describe(*given))
    app, loop = create_app(Served("tiny")), []

    @app.get("/which-thread")
    async def which_thread():
        loop.append(get_ident())

    with TestClient(app) as client:
        client.get("/which-thread")
        assert client.get("/openapi.json").json()["paths"]
        assert client.get("/openapi.json").json()["paths"]
    assert len(threads) == len(loop) == 1
    assert threads != loop


def test_nothing_is_documented_that_is_never_answered(call):
    document = call("GET", "/openapi.json").json()
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    assert '"422"' not in text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"temperature": -1}, {"model": "other"}, {"x": 1}])
def test_answers_of_the_text_endpoints_are_documented(call, path, more):
    document = call("GET", "/openapi.json").json()
    check(document, path, "post", call("POST", path, BODIES[path] | more))


def test_answers_of_the_other_endpoints_are_documented(call, application):
    document = call("GET", "/openapi.json").json()
    for path in (
        "/v1/models",
        "/health",
        "/metrics",
        "/api/tags",
        "/api/ps",
        "/api/version",
        "/props",
        "/slots",
        "/hybrimoe/state",
        "/hybrimoe/experts",
    ):
        check(document, path, "get", call("GET", path))
    check(document, "/v1/models/{model_id}", "get", call("GET", "/v1/models/tiny"))
    check(document, "/v1/models/{model_id}", "get", call("GET", "/v1/models/other"))
    check(document, "/slots/{id_slot}", "post", call("POST", "/slots/0?action=save", {"filename": "x"}))
    for path, body in OTHERS.items():
        check(document, path, "post", call("POST", path, body))


@pytest.mark.parametrize("path", BODIES)
def test_a_request_that_the_document_describes_is_taken(call, strict_call, path):
    """The schema of the body allows what is honoured, so clients made from it work."""
    for ask, strict in ((call, False), (strict_call, True)):
        document = ask("GET", "/openapi.json").json()
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(resolved(document, schema))
        assert validator.is_valid(BODIES[path])
        assert validator.is_valid(BODIES[path] | {"temprature": 1}) is not strict
    assert not validator.is_valid(BODIES[path] | {"temperature": 1e9})

"""What all requests pass: body limit, keys, methods, pages of other places, access log, states of the server."""

import asyncio
import logging
import socket

import pytest

from hybrimoe.errors import ConfigError
from hybrimoe.server.errors import ClientLeftError
from hybrimoe.server.http import listening

BODY = {"prompt": "It was", "max_tokens": 2}
PATH = "/v1/completions"


@pytest.fixture
def ask(application, client):
    """`ask(settings, method, path, **request)` sends one request to an application with these settings."""

    def send(settings, method, path, **request):
        app, served = application(**settings)

        async def run():
            async with client(app) as connection:
                return await connection.request(method, path, **request)

        response = asyncio.run(run())
        response.served = served
        return response

    return send


def test_a_body_above_the_limit_is_refused_and_not_kept(ask):
    large = ask({"max_body_bytes": 1000}, "POST", PATH, json={**BODY, "prompt": "x" * 1000})
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "request_too_large"
    assert "at most 1000" in large.json()["error"]["message"]
    assert ask({"max_body_bytes": 1000}, "POST", PATH, json=BODY).status_code == 200


def test_a_body_without_a_length_is_counted(ask):
    async def chunks():
        for _ in range(30):
            yield b"x" * 100

    response = ask({"max_body_bytes": 1000}, "POST", PATH, content=chunks())
    assert response.status_code == 413


def test_a_body_far_above_the_limit_is_refused_before_it_is_read(ask):
    async def never():
        yield b"{"
        raise AssertionError("the server reads on")

    response = ask({}, "POST", PATH, content=never(), headers={"content-length": str(10**12)})
    assert response.status_code == 413


def test_a_body_that_does_not_come_is_408(ask):
    async def slowly():
        yield b'{"prompt": '
        await asyncio.sleep(3600)

    answer = ask({"max_body_s": 0.01}, "POST", "/v1/completions", content=slowly())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics"])
def test_keys_are_asked_for_where_there_are_keys(ask, path):
    keys = {"api_keys": ["first", "schlüssel"]}
    for wrong in ({}, {"authorization": "Bearer no"}, {"authorization": "first"}, {"authorization": "Basic first"}):
        refused = ask(keys, "GET", path, headers=wrong)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert ask(keys, "GET", path, headers={"authorization": "Bearer first"}).status_code == 200
    assert ask({}, "GET", path).status_code == 200
    assert ask(keys, "GET", "/health").status_code == 200, "a supervisor needs no key"
    assert ask(keys, "POST", PATH, json=BODY).status_code == 401


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"])
def test_a_method_that_a_path_does_not_have_is_405_with_what_it_has(ask, method):
    response = ask({}, method, PATH)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"]
    assert ask({}, method, "/health").headers["allow"] == "GET"


def test_web_pages_of_other_places_may_only_call_where_the_configuration_says_so(ask):
    asking = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    assert ask({}, "OPTIONS", PATH, headers=asking).status_code == 405
    assert "access-control-allow-origin" not in ask({}, "GET", "/v1/models", headers=asking).headers
    allowed = {"cors_origins": ["https://chat.example.org"], "api_keys": ["key"]}
    answer = ask(allowed, "OPTIONS", PATH, headers=asking)
    assert answer.status_code == 200, "a browser asks without the key"
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    refused = ask(allowed, "OPTIONS", PATH, headers={**asking, "origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in refused.headers
    unknown = ask(allowed, "GET", "/v1/models", headers={"origin": "https://chat.example.org"})
    assert unknown.status_code == 401
    assert "access-control-allow-origin" in unknown.headers, "a page must be able to read why it was refused"


def test_the_access_log_says_who_asked_what_and_nothing_of_the_contents(ask, caplog):
    with caplog.at_level(logging.INFO, logger="hybrimoe.server.access"):
        ask({}, "POST", PATH, json={**BODY, "prompt": "a secret"})
        ask({"max_body_bytes": 10}, "POST", PATH, json=BODY)
        ask({}, "GET", "/nothing")
    lines = [record.getMessage() for record in caplog.records if record.name == "hybrimoe.server.access"]
    assert [line.split()[1:4] for line in lines] == [
        ["POST", PATH, "200"], ["POST", PATH, "413"], ["GET", "/nothing", "404"],
    ]  # fmt: skip
    assert "secret" not in caplog.text


def test_a_failure_of_a_route_is_an_answer_and_keeps_the_connection(ask, generator, monkeypatch, caplog):
    def fail(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(generator, "check_prompt", fail)
    response = ask({}, "POST", PATH, json=BODY)
    assert response.status_code == 500
    assert "the disk is gone" in response.json()["error"]["message"]
    assert "the disk is gone" in caplog.text, "with its traceback in the server's log"


def test_before_the_model_is_there_health_says_so_and_requests_are_asked_to_come_again(ask):
    health = ask({"loaded": False}, "GET", "/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    response = ask({"loaded": False}, "POST", PATH, json=BODY)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"]["code"] == "loading"
    assert ask({"loaded": False}, "GET", "/v1/models").status_code == 200


def test_a_server_that_drains_says_so(application, client):
    app, served = application()

    async def run():
        async with client(app) as connection:
            served.drain(5.0)
            return await connection.get("/health"), await connection.post(PATH, json=BODY)

    health, refused = asyncio.run(run())
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")


def test_a_client_that_leaves_while_it_sends_is_no_failure(application, connect, caplog):
    app, _ = application()

    async def run():
        connection = connect(app, PATH, BODY)
        connection.read = True
        connection.left.set()
        await connection.run()
        return await connection.sent.get()

    assert asyncio.run(run())["status"] == ClientLeftError.status
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


FORM, JSON = {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "application/json"}
TEXT = b'{"prompt": "It was", "max_tokens": 2}'


@pytest.mark.parametrize("headers", [{}, FORM, {"content-type": "text/plain"}])
def test_a_body_that_does_not_say_that_it_is_json_is_read_as_such_unless_a_page_sends_it(ask, headers):
    assert ask({}, "POST", PATH, content=TEXT, headers=headers).status_code == 200, "as llama-server's and Ollama's"
    for sent in ({"origin": "https://evil.example.org"}, {"sec-fetch-site": "cross-site"}):
        refused = ask({}, "POST", PATH, content=TEXT, headers={**headers, **sent})
        assert refused.status_code == 400
        assert "Content-Type: application/json" in refused.json()["error"]["message"]
        assert ask({}, "POST", PATH, content=TEXT, headers={**JSON, **sent}).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the request has no body: expected a JSON object"),
        (b"null", "the request has no body"),
        (b"[]", "must be a JSON object, found a list"),
        (b'"x"', "must be a JSON object, found a text"),
        (b'{"prompt": }', "not JSON: Expecting value, at character 11"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
    ],
)
def test_a_body_that_is_no_json_object_is_told_what_it_is(ask, body, words):
    answer = ask({}, "POST", PATH, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert words in error["message"]
    assert (error["param"], error["code"]) == (None, "invalid_request")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logit_bias": {"A": 1}}, "logit_bias.A"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a", [1]]}, "prompt.1"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_the_field_that_an_error_names_is_one_of_the_request(ask, more, param):
    error = ask({}, "POST", PATH, json={**BODY, **more}).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/api/tags", "/"])
def test_head_is_answered_as_get(ask, path):
    seen, asked = ask({}, "GET", path), ask({}, "HEAD", path)
    assert asked.status_code == seen.status_code == 200
    assert asked.headers["content-type"] == seen.headers["content-type"]


@pytest.mark.parametrize("address", ["http://x:8000", "HTTPS://proxy.example", "http://[::1]:80"])
def test_an_address_with_scheme_and_host_is_one_of_this_server(application, connect, address):
    """As proxies are sent it."""

    async def status(path):
        asked = connect(application()[0], path, BODY)
        await asked.run()
        return (await asked.sent.get())["status"]

    assert asyncio.run(status(address + PATH)) == 200
    assert asyncio.run(status(f"{address}/nowhere")) == 404


def test_a_path_that_there_is_not_gets_the_one_that_is_near_and_a_wrong_method_the_right_one(ask):
    for path in ("/chat/completions", "/v1/v1/chat/completions"):
        answer = ask({}, "POST", path, json=BODY)
        assert answer.status_code == 404
        assert "did you mean '/v1/chat/completions'?" in answer.json()["error"]["message"]
    wrong = ask({}, "GET", "/v1/completions").json()["error"]["message"]
    assert wrong == "'/v1/completions' takes POST, not GET"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]")])
def test_a_taken_port_is_told_once_with_its_address(host, shown):
    try:
        taken = listening(host, 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with taken, pytest.raises(ConfigError) as refused:
        listening(host, taken.getsockname()[1])
    assert str(refused.value).startswith(f"cannot listen on {shown}:")
    assert str(refused.value).count("Address already in use") == 1
    assert "bind" not in str(refused.value)


def test_a_connection_sends_each_piece_at_once():
    """Else the first text waits for the client's kernel to confirm the headers: 40 ms."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

"""`hybrimoe bench serve` against a server that is made for it, and once against the real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hybrimoe.demo import demo_model_path

pytest.importorskip("httpx")


class Answers:
    """What the made server does, and what it was asked."""

    def __init__(self):
        self.prompts = []
        self.refuse_next = 0
        self.reply = lambda prompt: [" one", " two", " three"]
        self.stream_error = None


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def url(answers):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Nothing on stderr."""

        def do_GET(self):
            pages = {
                "/v1/models": json.dumps({"data": [{"id": "made"}]}),
                "/metrics": "# HELP x\nhybrimoe_expert_hit_rate 0.25\n",
            }
            self._send(200 if self.path in pages else 404, pages.get(self.path, ""))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["temperature"], body["stream"]) == ("made", 0.0, True)
            if answers.refuse_next:
                answers.refuse_next -= 1
                self._send(503, "{}")
                return
            answers.prompts.append(body["prompt"])
            pieces = answers.reply(body["prompt"])
            events = [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]
            usage = {
                "prompt_tokens": 10,
                "completion_tokens": len(pieces),
                "prompt_tokens_details": {"cached_tokens": 4},
            }
            events.append({"choices": [], "usage": usage})
            if answers.stream_error is not None:
                events.append({"error": {"message": answers.stream_error}})
            self._send(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

        def _send(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def bench(hybrimoe, *words):
    return hybrimoe("bench", "serve", *words)


def test_each_number_of_users_is_a_row_with_its_counts(hybrimoe, url, answers):
    result = bench(hybrimoe, "--url", url, "-u", "1", "-u", "3", "--requests", "2", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert (data["model"], data["url"]) == ("made", url)
    one, three = data["rows"]
    assert (one["users"], one["requests"], three["requests"]) == (1, 2, 6)
    assert (three["prompt_tokens"], three["cached_tokens"], three["new_tokens"]) == (60, 24, 18)
    assert three["hit_rate"] == 0.25
    assert three["ttft_ms"]["p95"] >= three["ttft_ms"]["p50"] > 0
    assert three["tokens_per_s"] == pytest.approx(18 / three["seconds"])


def test_users_ask_different_things_and_each_turn_sends_all_before_it(hybrimoe, url, answers):
    bench(hybrimoe, "--url", url, "-u", "2", "--requests", "4", "--turns", "2", "--prompt-words", "5")
    asked = [prompt for prompt in answers.prompts if len(prompt.split()) != 6]  # the check's prompt has six words
    firsts = [prompt for prompt in asked if len(prompt.split()) == 5]
    assert len(asked) == 8
    assert len(set(firsts)) == len(firsts) == 4
    for prompt in set(asked) - set(firsts):
        assert any(prompt.startswith(first + " one two three ") for first in firsts)


def test_what_is_refused_is_asked_again_and_counted(hybrimoe, url, answers):
    answers.reply = lambda prompt: setattr(answers, "refuse_next", int(len(answers.prompts) == 1)) or ["a", "b"]
    result = bench(hybrimoe, "--url", url, "-u", "1", "--requests", "2", "--json")
    (row,) = json.loads(result.out)["rows"]
    assert row["requests"] - row["refused"] == 2
    assert row["refused"] <= 1


def test_a_reply_that_depends_on_the_load_ends_the_benchmark(hybrimoe, url, answers):
    answers.reply = lambda prompt: [f"reply {len(answers.prompts)}"]
    result = bench(hybrimoe, "--url", url, "-u", "1", "--requests", "1")
    assert result.code == 1
    assert "not the same alone and beside other requests" in " ".join(result.err.split())


def test_an_error_within_a_stream_is_told(hybrimoe, url, answers):
    answers.stream_error = "a lane died"
    result = bench(hybrimoe, "--url", url, "-u", "1")
    assert result.code == 1
    assert "a lane died" in result.err


def test_no_server_no_api_and_options_of_another_server_are_told(hybrimoe, url):
    nobody = bench(hybrimoe, "--url", "http://127.0.0.1:9")
    assert (nobody.code, "Connection refused" in nobody.err) == (1, True)
    other = bench(hybrimoe, "--url", url + "/elsewhere")
    assert (other.code, "OpenAI-compatible" in other.err) == (1, True)
    unused = bench(hybrimoe, "--url", url, "--dtype", "int8", "--slots", "4")
    assert unused.code == 2
    assert "leave out --slots, --dtype" in unused.err


@pytest.mark.slow
def test_a_server_that_does_not_start_gives_its_reason(hybrimoe, tmp_path):
    nothing = bench(hybrimoe, str(tmp_path / "nothing"))
    assert (nothing.code, "no model directory" in " ".join(nothing.err.split())) == (1, True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo_model_path() / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    result = bench(hybrimoe, str(tmp_path))
    assert result.code == 1
    assert "the server did not start: " in " ".join(result.err.split())
    assert "model.safetensors is truncated" in result.err.replace("\n", "")


@pytest.mark.slow
def test_the_real_server_is_started_measured_and_ended(hybrimoe):
    result = bench(hybrimoe, "-u", "2", "--requests", "2", "--turns", "2", "-n", "4", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    (row,) = data["rows"]
    assert (data["model"], row["requests"]) == ("demo", 4)
    assert 0 < row["new_tokens"] <= 16
    assert row["cached_tokens"] > 0, "second turns reuse what the first computed"

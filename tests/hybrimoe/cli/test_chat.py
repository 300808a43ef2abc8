"""`hybrimoe chat` over a pipe and with signals, on the demo model."""

import json
import signal

import pytest

from tests.forked import HYBRIMOE, Forked

SHORT = ("--max-new-tokens", "6", "--seed", "3", "--temperature", "0.8")


def turns(result):
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.fixture(scope="module")
def conversation(hybrimoe):
    """Five lines with JSON: two turns, one of them over two lines, a reset, one more turn, one that is too long."""
    lines = ["Good morning", "", "And then\\", "what?", "/reset", "Good morning", "word " * 4000]
    result = hybrimoe("chat", *SHORT, "--json", stdin="\n".join(lines) + "\n")
    assert result.code == 0, result.err
    return turns(result)


def test_each_line_is_a_message_and_the_cache_is_kept(conversation):
    first, second = conversation[:2]
    assert first["new_tokens"] == second["new_tokens"] == 6
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + 6
    assert second["experts"]["total"]["calls"] > 0


def test_reset_forgets(conversation):
    first, _, again = conversation[:3]
    assert again["text"] == first["text"]
    assert again["prompt_tokens"] == again["reused_tokens"] == first["prompt_tokens"]


def test_a_message_that_is_too_long_is_an_error_of_its_own(conversation):
    assert len(conversation) == 4
    assert conversation[3]["error"]["type"] == "PromptError"
    assert "context is 2048 tokens" in conversation[3]["error"]["message"]


def test_a_session_goes_on_where_it_was(hybrimoe, conversation):
    words = ("chat", *SHORT, "--json", "--session", "walk")
    (first,) = turns(hybrimoe(*words, stdin="Good morning\n"))
    result = hybrimoe(*words, stdin="And then\\\nwhat?\n")
    (second,) = turns(result)
    assert [first["text"], second["text"]] == [turn["text"] for turn in conversation[:2]]
    assert second["reused_tokens"] == conversation[1]["reused_tokens"]
    assert "1 message of yours so far" in result.err
    assert hybrimoe("chat", "--list-sessions").out == "walk\n"
    assert hybrimoe("chat", "--session", "walk", "--system", "Be brief.").code == 2
    assert hybrimoe("chat", "--delete-session", "walk", "--json").data == {"sessions": []}
    assert hybrimoe("chat", "--delete-session", "walk").code == 1


def test_replies_go_to_stdout_and_the_rest_to_stderr(hybrimoe, conversation):
    stdin = f"/stats\n/stat\n{'word ' * 4000}\nGood morning\n/stats\n/timeline\n/reset\n/help\n/exit\nnever read\n"
    result = hybrimoe("chat", *SHORT, stdin=stdin)
    assert result.code == 0
    assert result.out == conversation[0]["text"] + "\n"
    told = " ".join(result.err.split())
    for words in ("no reply yet", "did you mean '/stats'", "context is 2048 tokens", "tokens/s", "hit rate", "lane"):
        assert words in told
    for words in ("nothing was recorded", "is forgotten", "/timeline"):
        assert words in told


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_pipe_of_which_no_message_was_answered_is_a_failure(hybrimoe, words):
    result = hybrimoe("chat", *SHORT, *words, stdin=f"{'word ' * 4000}\n/help\n")
    assert result.code == 1
    assert "context is 2048 tokens" in " ".join((result.out + result.err).split())


def test_quiet_is_only_replies(hybrimoe, conversation):
    result = hybrimoe("chat", *SHORT, "--quiet", stdin="Good morning\n")
    assert result.out == conversation[0]["text"] + "\n"
    assert result.err == ""


@pytest.mark.parametrize("words", [("--policy", "nope"), ("--seed", "-1"), ("--config", "/nonexistent.yaml")])
def test_wrong_usage_ends_before_the_model_is_loaded(hybrimoe, words):
    result = hybrimoe("chat", *words, stdin="Good morning\n")
    assert result.code == 2
    assert "error: " in result.err.lower()
    assert result.out == ""


def test_ctrl_c_stops_the_reply_and_not_the_program():
    """The reply is streamed unbuffered, so that the signal is sent when its first characters are there."""
    with Forked(HYBRIMOE, "chat", "-n", "40", "--seed", "3", "-t", "1") as process:
        process.stdin.write("Good morning\n")
        process.stdin.flush()
        assert process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("And then?\n/exit\n")
        assert process.returncode == 0
    assert err.count("tokens/s") == 2, "the message after the interrupted one was answered, too"
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert out.count("\n") >= 2


def test_a_chat_tells_profile_and_drafts(hybrimoe):
    words = ("chat", "--accelerator", "none", "--speculate", "--profile", "-n", "8", "-t", "0")
    told = hybrimoe(*words, stdin="Good morning\n").err
    assert "part of a token's time" in told
    assert "steps saved by drafts" in told
    (line,) = hybrimoe(*words, "--json", stdin="Good morning\n").out.splitlines()
    data = json.loads(line)
    assert data["profile"]["decode"]["tokens"] == 7
    assert data["speculation"]["steps"] + data["speculation"]["steps_saved"] == 7

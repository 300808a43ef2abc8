"""`hybrimoe chat` over a pipe and with signals, on the demo model."""

import json
import os
import signal
import subprocess
import sys

import pytest

SHORT = ("--max-new-tokens", "6", "--seed", "3", "--temperature", "0.8")


def turns(result):
    return [json.loads(line) for line in result.out.splitlines()]


def test_each_line_is_a_message_and_the_cache_is_kept(hybrimoe):
    result = hybrimoe("chat", *SHORT, "--json", stdin="Good morning\n\nAnd then\\\nwhat?\n")
    assert result.code == 0, result.err
    first, second = turns(result)
    assert first["new_tokens"] == second["new_tokens"] == 6
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + 6
    again = turns(hybrimoe("chat", *SHORT, "--json", stdin="Good morning\n"))
    assert again[0]["text"] == first["text"]


def test_replies_go_to_stdout_and_the_rest_to_stderr(hybrimoe):
    result = hybrimoe("chat", *SHORT, stdin="Good morning\n/stats\n/reset\n/help\n/exit\nnever read\n")
    assert result.code == 0
    text = turns(hybrimoe("chat", *SHORT, "--json", stdin="Good morning\n"))[0]["text"]
    assert result.out == text + "\n"
    for words in ("tokens/s", "hit rate", "is forgotten", "/timeline", "lane"):
        assert words in result.err
    quiet = hybrimoe("chat", *SHORT, "--quiet", stdin="Good morning\n")
    assert quiet.out == text + "\n"
    assert quiet.err == ""


def test_reset_forgets(hybrimoe):
    first, second = turns(hybrimoe("chat", *SHORT, "--json", stdin="Good morning\n/reset\nGood morning\n"))
    assert first["text"] == second["text"]
    assert second["reused_tokens"] == 0


def test_an_unknown_command_and_a_message_that_is_too_long_do_not_end_the_chat(hybrimoe):
    result = hybrimoe("chat", *SHORT, stdin=f"/stat\n{'word ' * 4000}\nGood morning\n")
    assert result.code == 0
    assert "'/stats'" in result.err
    assert "context is 2048 tokens" in " ".join(result.err.split())
    assert result.out.strip()
    lines = turns(hybrimoe("chat", *SHORT, "--json", stdin=f"{'word ' * 4000}\nGood morning\n"))
    assert lines[0]["error"]["type"] == "PromptError"
    assert lines[1]["text"]


@pytest.mark.parametrize("words", [("--policy", "nope"), ("--seed", "-1"), ("--config", "/nonexistent.yaml")])
def test_wrong_usage_ends_before_the_model_is_loaded(hybrimoe, words):
    result = hybrimoe("chat", *words, stdin="Good morning\n")
    assert result.code == 2
    assert result.err.startswith("error: ")


def test_ctrl_c_stops_the_reply_and_not_the_program():
    """The reply is streamed unbuffered, so that the signal is sent when its first characters are there."""
    command = [sys.executable, "-m", "hybrimoe", "chat", "-n", "300", "--seed", "3", "-t", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=dict(os.environ)) as process:
        process.stdin.write(b"Good morning\n")
        process.stdin.flush()
        assert process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"And then?\n/exit\n", timeout=100)
    assert process.returncode == 0
    assert err.count(b"tokens/s") == 2, "the message after the interrupted one was answered, too"
    assert err.count(b"interrupted") == 1
    assert b"Traceback" not in err
    assert out.count(b"\n") >= 2

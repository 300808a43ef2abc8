"""The process ends when its work has: what was registered runs, and nothing is taken apart."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from hybrimoe.cli import app

class Slow:
    def __del__(self):
        print("taken apart", flush=True)

kept = Slow()
atexit.register(print, "registered")
sys.argv = ["hybrimoe", *sys.argv[1:]]
if sys.argv.pop(1) == "busy":
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
app.main()
"""


def end(state: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, state, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["no-such-command"], 2)])
def test_it_ends_with_its_code_and_is_not_taken_apart(words: list[str], code: int) -> None:
    done = end("idle", *words)
    assert done.returncode == code, done.stderr
    assert "registered" in done.stdout
    assert "taken apart" not in done.stdout
    assert code == 0 or "no-such-command" in done.stderr


def test_threads_that_have_work_are_waited_for() -> None:
    done = end("busy", "--version")
    assert done.returncode == 0
    assert "thread" in done.stdout
    assert "taken apart" in done.stdout

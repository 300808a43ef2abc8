"""Runs command lines in this process, as the console script would."""

import json
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from hybrimoe.cli.app import app


@dataclass
class Outcome:
    """What a command line left: exit code, stdout and stderr as text."""

    code: int
    out: str
    err: str

    @property
    def data(self):
        """stdout as one JSON document."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def hybrimoe():
    """Call it with the words of a command line, and `stdin` text."""

    def run(*words, stdin=None):
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


TERMINAL = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
            "TERMINAL_WIDTH", "LINES", "HYBRIMOE_DEBUG")  # fmt: skip
"""What of the environment decides how programs print, and is taken away: tests read what is printed."""


@pytest.fixture(scope="session", autouse=True)
def plain_terminal():
    """80 columns without colour, whatever terminal the tests run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "xterm")
        for name in TERMINAL:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def small_machine(tmp_path_factory, private_cache):
    """The demo model is packed once for all command lines, nothing is left in the home directory, and torch computes
    with one thread: the model is too small for more, and other tests may be running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path_factory.mktemp("packed"))))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)

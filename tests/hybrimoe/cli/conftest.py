"""Runs command lines in this process, as the console script would."""

import json
from dataclasses import dataclass

import pytest
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


@pytest.fixture
def hybrimoe():
    """Call it with the words of a command line, and `stdin` text."""

    def run(*words, stdin=None):
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run

"""A server of this program in a process of its own, for as long as it is measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

from hybrimoe.errors import HybriMoEError

STOP_S = 20.0
"""Seconds that a server has to end after it was asked to."""


class StartError(HybriMoEError):
    """The server did not start; the message is what it said."""


@contextlib.contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[str]:
    """The address of `hybrimoe serve ARGUMENTS` on a free port. Raises StartError with what it said where it ends."""
    command = [sys.executable, "-m", "hybrimoe", "serve", *arguments, "--port", "0", "--json"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True)
        try:
            yield _address(process, said)
        finally:
            _end(process)


def _address(process: subprocess.Popen[str], said: IO[str]) -> str:
    """What the server's JSON document says; it is written once the server listens."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == "}":
            break
    try:
        return str(json.loads("".join(lines))["url"])
    except (ValueError, KeyError):
        process.wait()
        said.seek(0)
        raise StartError(f"the server did not start: {_reason(lines, said.read())}") from None


def _reason(lines: Sequence[str], said: str) -> str:
    """The message of the error that the server wrote as JSON, or all that it said."""
    try:
        return str(json.loads("".join(lines))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said.strip() or "it said nothing"


def _end(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C would, and harder where that is not enough."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()

"""Programs of tests that need torch and transformers, each in a process of its own, forked from one that has imported
them: importing takes seconds of CPU, forking milliseconds.

What a test asks about the imports, about what is read from the environment at import, or about the interpreter's start
needs a process that starts as a user's does.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import IO

HYBRIMOE = "from hybrimoe.cli.app import main; main()"
"""The program `hybrimoe`."""
IMPORTED = (
    "hybrimoe.cli.serve", "hybrimoe.server.app", "hybrimoe.checkpoint.loading", "hybrimoe.checkpoint.pack.dense",
    "hybrimoe.injection.inject", "hybrimoe.runtime.session", "hybrimoe.step.build", "cpu_kernels.step.run",
)  # fmt: skip
HANG_SECONDS = 600  # no machine is as slow: what takes so long hangs


@functools.cache
def _context() -> ForkServerContext:
    missing = [name for name in IMPORTED if importlib.util.find_spec(name) is None]
    assert not missing, f"{missing} are elsewhere now; each program would import its new home"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _run(code: str, arguments: tuple[str, ...], environment: dict[str, str], streams: tuple[Connection, ...]) -> None:
    """In the new process: as the interpreter does with ``-c``."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(at, how, encoding="utf-8") for at, how in enumerate("rww"))
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch has looked when it was imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program of a test>", "exec"), {"__name__": "__main__"})


class Forked:
    """A running program: `code` with `arguments`, as ``python -c`` runs it. Its streams are pipes, of text.

    Used as a context manager, or ended by `close`: what still runs then is killed.
    """

    def __init__(self, code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        pipes = [_context().Pipe(duplex=False) for _ in range(3)]
        theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
        ours = (pipes[0][1], pipes[1][0], pipes[2][0])
        self._process = _context().Process(target=_run, args=(code, arguments, dict(environment or os.environ), theirs))
        self._process.start()
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(os.dup(stream.fileno()), mode, encoding="utf-8") for stream, mode in zip(ours, "wrr", strict=True)
        )
        for stream in (*theirs, *ours):
            stream.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: None while it runs, a negative number if a signal ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program."""
        os.kill(self.pid, number)

    def communicate(self, text: str = "") -> tuple[str, str]:
        """Writes `text` and the end of the input, waits for the program's end; returns what it said on stdout and
        stderr."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stderr.read()))
        reader.start()
        self.stdin.write(text)
        self.stdin.close()
        out = self.stdout.read()
        reader.join()
        self._process.join(HANG_SECONDS)
        assert self.returncode is not None, f"the program hangs; it said {out} and {said[0]}"
        return out, said[0]

    def close(self) -> None:
        """Ends the program if it has not ended."""
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
        self._process.join()
        streams: tuple[IO[str], ...] = (self.stdin, self.stdout, self.stderr)
        for stream in streams:
            stream.close()
        self._process.close()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

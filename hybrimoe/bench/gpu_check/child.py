"""A child process that is watched: it has so long to end, and one that does not is asked where it stands."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

STACKS_S = 10.0
"""Time for a process to write the stacks of its threads before it is killed."""
LOG_TAIL_CHARACTERS = 12_000
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. code: its exit code, negative for a signal; None: it had to be ended. seconds: until then.
    silent_s: from its last output to its end. threads: what the system said of a hanging child's threads."""

    code: int | None
    seconds: float
    silent_s: float
    output: str
    threads: str = ""

    @property
    def why(self) -> str:
        """One line for a report; "" where all is well."""
        if self.code is None:
            return (
                f"the process had not ended after {self.seconds:.0f} s (its last output was {self.silent_s:.0f} s ago)"
            )
        return "" if self.code == 0 else f"the process ended with code {self.code}"


def python_child(*words: str) -> list[str]:
    """A command line of this Python, which writes the stacks of all threads when it is aborted."""
    return [sys.executable, "-X", "faulthandler", *words]


class Child:
    """A command that runs; its output goes to `log`.

    limit_s: after which it is aborted, and killed with all that it has started. extra: environment variables on top of
    this process's. The child imports the packages that this process does.
    """

    def __init__(
        self, argv: Sequence[str], limit_s: float, log: Path, *, cwd: Path | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        package_root = str(Path(__file__).parents[3])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(extra or {})}
        self._limit_s, self._log, self._started = limit_s, log, time.time()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=environment,
                start_new_session=True,
            )  # fmt: skip
        if sys.platform == "linux":
            resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))

    def ended(self) -> Ended | None:
        """How it ended; None while it runs and has time left."""
        code = self._process.poll()
        now, last_output = time.time(), self._log.stat().st_mtime
        threads = ""
        if code is None:
            if now - self._started < self._limit_s:
                return None
            threads = _threads(self._process.pid)
            self._process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STACKS_S)
        self.kill()
        output = self._log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
        return Ended(code, now - self._started, max(0.0, now - last_output), output, threads)

    def kill(self) -> None:
        """Ends it and what it has started, if they are still there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def as_they_end(children: Sequence[Child]) -> Iterator[tuple[int, Ended]]:
    """(index, how it ended) of each child. When the caller is interrupted none stays behind."""
    running = dict(enumerate(children))
    try:
        while running:
            for index, child in list(running.items()):
                ended = child.ended()
                if ended is not None:
                    del running[index]
                    yield index, ended
            time.sleep(POLL_S)
    finally:
        for child in running.values():
            child.kill()


def run_child(
    argv: Sequence[str], limit_s: float, log: Path, *, cwd: Path | None = None, extra: Mapping[str, str] | None = None
) -> Ended:
    """Runs one command to its end; see `Child`."""
    ((_, ended),) = as_they_end([Child(argv, limit_s, log, cwd=cwd, extra=extra)])
    return ended


def _threads(pid: int) -> str:
    """Name, state and kernel function of each thread of a process, one a line; "" where the system does not tell."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            stat = (task / "stat").read_text(encoding="ascii", errors="replace")
            state = stat.rpartition(")")[2].split()[0]
            waits = (task / "wchan").read_text(encoding="ascii", errors="replace")
            lines.append(f"{task.name} {(task / 'comm').read_text().strip()} {state} {waits}")
    return "\n".join(lines)

"""A child process that is watched: it has so long to end, and one that does not is asked where it stands."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STACKS_S = 10.0
"""Time for a process to write the stacks of its threads before it is killed."""
LOG_TAIL_CHARACTERS = 12_000


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


def run_child(
    argv: Sequence[str], limit_s: float, log: Path, *, cwd: Path | None = None, extra: Mapping[str, str] | None = None
) -> Ended:
    """Runs a command; its output goes to `log`. After `limit_s` it is aborted, and killed with its own children.

    extra: environment variables on top of this process's. The child imports the packages that this process does.
    """
    package_root = str(Path(__file__).parents[3])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(extra or {})}
    started = time.time()
    threads = ""
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=environment,
            start_new_session=True,
        )  # fmt: skip
        if sys.platform == "linux":
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        try:
            code: int | None = process.wait(limit_s)
            ended, last_output = time.time(), log.stat().st_mtime
        except subprocess.TimeoutExpired:
            ended, last_output = time.time(), log.stat().st_mtime
            code, threads = None, _threads(process.pid)
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
    return Ended(code, ended - started, max(0.0, ended - last_output), output, threads)


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

"""How the threads of parallel regions wait for work: asleep, unless this program has the machine to itself."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
KERNELS_ALONE = ("bench", "kernels")
"""This command measures kernels on an idle machine, as their peers are measured: it keeps OpenMP's own way."""
ONE_JOB = ("generate", "bench", "calibrate", "trace")
"""Commands that compute and end: how busy the machine is when they start says how busy it will be."""
LOAD_FILE = Path("/proc/loadavg")
SAMPLES, SAMPLE_S = 5, 0.01


def set_wait_policy(
    words: Sequence[str],
    environment: MutableMapping[str, str] = os.environ,
    busy: Callable[[], bool] | None = None,
) -> None:
    """Lets OpenMP's idle threads sleep, for a program whose command line is `words`; before torch is imported.

    torch brings a pool of as many threads as there are cores, and OpenMP's way is that idle ones spin for milliseconds:
    on the core that the kernels' team, an emulated lane or another program needs. Between the steps of a reply torch
    has one thread (`hybrimoe.dense.threads`), so that this is about prompts, and about models whose large dense layers
    torch computes. Waking threads takes time, too. So one job on an idle machine spins, and everything else sleeps.
    What the user has set stays.
    """
    if WAIT_POLICY in environment or SPIN_COUNT in environment or tuple(words[:2]) == KERNELS_ALONE:
        return
    if not set(words[:1]) & set(ONE_JOB) or (busy or others_run)():
        environment[WAIT_POLICY] = "passive"


def others_run(load_file: Path = LOAD_FILE) -> bool:
    """Whether another process is computing now; True where the system does not say.

    Linux counts the runnable threads of the machine in /proc/loadavg (field 4, this one among them).
    """
    running = []
    for _ in range(SAMPLES):
        try:
            running.append(int(load_file.read_text(encoding="ascii").split()[3].split("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return True
        time.sleep(SAMPLE_S)
    return statistics.median(running) >= 1

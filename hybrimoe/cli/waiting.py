"""How the threads of parallel regions wait for work: asleep, unless the user or the command wants them awake."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
KERNELS_ALONE = ("bench", "kernels")
"""This command measures kernels on an idle machine, as their peers are measured: it keeps OpenMP's own way."""


def set_wait_policy(words: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's idle threads sleep, for a program whose command line is `words`; before torch is imported.

    torch and Numba each bring a pool of as many threads as there are cores, and OpenMP's way is that idle ones spin for
    about a millisecond: on the core that the other pool, an emulated lane or another program needs. Measured on 2 cores
    beside other work: 3 tokens a second where sleeping threads gave 98; on an idle machine the two are equal within
    noise for a whole model, and a layer of experts alone is 10 % slower.
    """
    if tuple(words[:2]) != KERNELS_ALONE and WAIT_POLICY not in environment and SPIN_COUNT not in environment:
        environment[WAIT_POLICY] = "passive"

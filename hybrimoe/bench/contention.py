"""How much of a model's decode speed is left beside other programs, and what that costs on an idle machine.

Rounds alone, beside busy loops, and alone with threads that spin without end instead of going to sleep.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from cpu_kernels.engine.team import spinning
from hybrimoe.bench.rounds import alternate, spread
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.sampling import SamplingOptions

PROMPT = "It was a bright morning, and Elizabeth"
LOOP = "while True: pass"


@dataclass(frozen=True, slots=True)
class Contention:
    """Milliseconds of a decode step by round (the median of its steps), measured; loops: programs beside it."""

    loops: int
    idle_ms: tuple[float, ...]
    busy_ms: tuple[float, ...]
    spinning_ms: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of the idle speed, what is left beside the loops."""
        return median(self.idle_ms) / median(self.busy_ms)

    @property
    def idle_loss(self) -> float:
        """Of the speed of threads that never sleep, what those lose that do, alone; negative where they gain."""
        return 1 - median(self.spinning_ms) / median(self.idle_ms)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "loops": self.loops,
            "idle_ms": spread(self.idle_ms),
            "busy_ms": spread(self.busy_ms),
            "spinning_ms": spread(self.spinning_ms),
            "share_of_idle_speed": self.share,
            "idle_loss": self.idle_loss,
        }


def measure(
    generator: TextGenerator, loops: int, rounds: int, n_tokens: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Contention:  # fmt: skip
    """Alternating rounds of one reply of `n_tokens` tokens: alone, beside `loops` endless Python loops, and alone with
    threads that never sleep."""
    beside = {"idle": nullcontext, "busy": partial(busy_loops, loops), "spinning": spinning}
    values = alternate(beside, partial(_step_ms, generator, n_tokens), rounds, progress=progress)
    return Contention(loops, tuple(values["idle"]), tuple(values["busy"]), tuple(values["spinning"]))


def _step_ms(generator: TextGenerator, n_tokens: int, beside: Callable[[], AbstractContextManager[Any]]) -> float:
    """Median of the decode steps of one reply, which no end-of-sequence token ends."""
    options = SamplingOptions(max_new_tokens=n_tokens, ignore_eos=True, seed=0)
    with beside():
        reply = generator.reply(generator.encode(PROMPT), options)
        for _ in reply:
            pass
    return median(reply.times.between_tokens_us) / 1000


@contextmanager
def busy_loops(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """n processes that compute without end, while the block runs."""
    with ExitStack() as running:
        processes = []
        for _ in range(n):
            processes.append(running.enter_context(subprocess.Popen([sys.executable, "-c", LOOP])))
            running.callback(processes[-1].kill)
        yield processes

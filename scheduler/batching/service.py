"""Which batch runs next: eMoE's task-aware order (arXiv 2503.06823).

The paper orders requests by service level (SLO), by the output length that their task is expected to have, and by what
loading their experts takes; it names these three inputs, the way they are combined here is ours. Among the waiting
batches the next one has

1. the highest service level (``priority``) of a member;
2. of those, the least slack: min over members of deadline - now - (load + prefill + new_tokens * step);
   a request without a deadline has infinite slack;
3. of those, the least load: us to bring the experts that it is expected to use and the batch before did not,
   load = expert_us * sum_{l,e} q(l, e) * (1 - q_before(l, e)), q = 1 - prod_members (1 - p(l, e));
4. of those, the one with the first request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulerError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a batched job. ``deadline_us`` counts from the job's start; a higher ``priority`` goes first."""

    n_prompt: int
    n_new: int
    priority: int = 0
    deadline_us: float = math.inf

    def __post_init__(self) -> None:
        if self.n_prompt < 1 or self.n_new < 1:
            raise SchedulerError(f"a request needs prompt and new tokens, found {self.n_prompt} and {self.n_new}")
        if not self.deadline_us > 0.0:
            raise SchedulerError(f"a deadline must lie above 0 us after the start, found {self.deadline_us}")


@dataclass(frozen=True, slots=True)
class ServiceCosts:
    """What a batch is expected to take, us: one prompt token, one decode step, one expert over the link."""

    prompt_token_us: float = 0.0
    step_us: float = 0.0
    expert_us: float = 0.0


class ServiceOrder:
    """Picks batches (positions in ``requests``) one after another; ``routes`` float [requests, layers, experts] or
    None."""

    def __init__(
        self, requests: Sequence[Request], batches: Sequence[Sequence[int]], routes: Floats | None = None
    ) -> None:
        self._requests = requests
        self._waiting = [tuple(batch) for batch in batches]
        self._uses = None if routes is None else {batch: _uses(routes, batch) for batch in self._waiting}
        self._before: Floats | None = None

    def __len__(self) -> int:
        """Batches that wait."""
        return len(self._waiting)

    def next(self, now_us: float, costs: ServiceCosts = ServiceCosts()) -> tuple[int, ...]:
        """Takes the next batch, ``now_us`` after the job's start. Raises SchedulerError when none waits."""
        if not self._waiting:
            raise SchedulerError("no batch is waiting")
        chosen = min(self._waiting, key=lambda batch: self._rank(batch, now_us, costs))
        self._waiting.remove(chosen)
        if self._uses is not None:
            self._before = self._uses[chosen]
        return chosen

    def load_us(self, batch: Sequence[int], costs: ServiceCosts) -> float:
        """us to bring what the batch is expected to use beyond what the one before did; 0 without routes."""
        if self._uses is None:
            return 0.0
        uses = self._uses[tuple(batch)]
        return costs.expert_us * float((uses if self._before is None else uses * (1.0 - self._before)).sum())

    def slack_us(self, batch: Sequence[int], now_us: float, costs: ServiceCosts) -> float:
        """The least slack of the batch's requests."""
        members = [self._requests[at] for at in batch]
        prefill_us = costs.prompt_token_us * sum(member.n_prompt for member in members)
        start_us = now_us + self.load_us(batch, costs) + prefill_us
        return min(member.deadline_us - start_us - member.n_new * costs.step_us for member in members)

    def _rank(self, batch: tuple[int, ...], now_us: float, costs: ServiceCosts) -> tuple[float, float, float, int]:
        level = max(self._requests[at].priority for at in batch)
        return (-level, self.slack_us(batch, now_us, costs), self.load_us(batch, costs), min(batch))


def _uses(routes: Floats, batch: Sequence[int]) -> Floats:
    """Chance that some member's token goes to each expert, [layers, experts]."""
    return np.asarray(1.0 - np.prod(1.0 - np.clip(routes[list(batch)], 0.0, 1.0), axis=0), np.float64)

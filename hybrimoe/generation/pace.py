"""How many tokens to draft: as many as give most tokens a second by what was measured, none where drafts lose."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

__all__ = ["MAX_DRAFT_TOKENS", "DraftPace"]

MAX_DRAFT_TOKENS = 3
"""With the token before them a step has 4 rows; each further one brings experts of its own to read, and is right less
often."""
KEPT_TIMES, NEEDED_TIMES = 5, 2
"""The median of the latest times of a kind of step counts, once there are so many."""
STALE_STEPS, STALE_STEPS_IF_RIGHT = 256, 32
"""Steps after which a time is measured again: the context has grown, or the machine has other things to do. While
drafts lose, NEEDED_TIMES * MAX_DRAFT_TOKENS steps of these many are spent on it. Where drafts are mostly right (RIGHT),
they give nearly the tokens that they cost, so longer ones than now are tried sooner."""
RIGHT = 0.8
"""Acceptance from which drafts are mostly right."""
FIRST_ACCEPTANCE = 0.3
"""Taken for the acceptance of a text of which nothing is known: drafting begins at once where it is cheap, elsewhere
after some drafts that were passed over have turned out right."""
ACCEPTANCE_WEIGHT = 0.15
"""Of the latest drafted token in the running acceptance."""
WORTH_TRYING = 1.15
"""Tokens that a step must be expected to give before its time is measured: it takes at least as long as a plain one."""


class DraftPace:
    """Times of steps by their rows, kept from reply to reply, and the acceptance of the reply under way.

    A step of a token and k drafted ones gives 1 + a + ... + a^k tokens, where a is the running share of drafted tokens
    that were right. The k is taken that gives most tokens for the measured time of k + 1 rows. Drafts that are not
    computed are still compared with the tokens that come, so drafting begins again where the text begins to repeat.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock_ns = clock_ns
        self.acceptance = FIRST_ACCEPTANCE
        self._us: dict[int, deque[float]] = {}
        self._measured_at: dict[int, int] = {}
        self._n_steps = 0

    def begin_reply(self) -> None:
        """Another text, of which nothing is known."""
        self.acceptance = FIRST_ACCEPTANCE

    def compared(self, right: bool) -> None:
        """A drafted token was right or not."""
        self.acceptance += ACCEPTANCE_WEIGHT * (right - self.acceptance)

    def measured(self, n_rows: int, us: float) -> None:
        """A step of `n_rows` took so long."""
        times = self._us.setdefault(n_rows, deque(maxlen=KEPT_TIMES))
        if self._age(n_rows) >= STALE_STEPS_IF_RIGHT:
            times.clear()
        times.append(us)
        self._n_steps += 1
        self._measured_at[n_rows] = self._n_steps

    def n_to_draft(self, n_offered: int) -> int:
        """How many of the offered tokens to compute with the next one."""
        choices = range(min(n_offered, MAX_DRAFT_TOKENS) + 1)
        best = max(choices, key=lambda k: (self._tokens_per_us(k), -k))
        for k in choices:
            if not self._is_known(k, best) and (k == 0 or self._expected(k) >= WORTH_TRYING):
                return k
        return best

    def _is_known(self, k: int, best: int) -> bool:
        """Whether the time of a step with k drafted tokens can be relied on; best: the k that gives most by now."""
        soon = k > best and self.acceptance >= RIGHT
        limit = STALE_STEPS_IF_RIGHT if soon else STALE_STEPS
        return len(self._us.get(k + 1, ())) >= NEEDED_TIMES and self._age(k + 1) < limit

    def _age(self, n_rows: int) -> int:
        """Steps since the last one of so many rows."""
        return self._n_steps - self._measured_at.get(n_rows, self._n_steps)

    def _tokens_per_us(self, k: int) -> float:
        """By what was measured; 0 where nothing was."""
        times = self._us.get(k + 1)
        return self._expected(k) / median(times) if times else 0.0

    def _expected(self, k: int) -> float:
        """Tokens that a step with k drafted ones gives."""
        return sum(self.acceptance**i for i in range(k + 1))

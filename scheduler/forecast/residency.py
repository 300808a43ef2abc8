"""How long an expert keeps its slot: the tokens over which its residency pays.

lifetime = slots / transfers a token is how long a resident stays on average. Its worth is the uses expected over fewer
tokens: one that is wanted again comes back soon, so the later part of a long stay is no saving.
"""

from __future__ import annotations

import math
from typing import Final

HORIZON_SCALE: Final = 0.5
"""Residency pays over so many times the root of the lifetime in tokens (gpt-oss-20b and OLMoE, tuning halves: a share
of the lifetime is right at 25 or at 50 % cached, not at both)."""
TRANSFER_WEIGHT: Final = 0.02
"""Weight of the newest token in the mean number of transfers a token."""
FIRST_TRANSFERS: Final = 1.0
"""Transfers a token that are assumed before any was seen."""
LEAST_TRANSFERS: Final = 1e-3


class Residency:
    """Counts transfers; ``horizon``: tokens over which residency pays now."""

    def __init__(self, n_slots: int, horizon_scale: float = HORIZON_SCALE) -> None:
        self._transfers_a_token, self._counting = FIRST_TRANSFERS, False
        self.count = 0
        """Transfers of this step, see ``transferred``."""
        self.horizon_scale = horizon_scale
        self.horizon = self._expected(n_slots)

    def transferred(self, n: int = 1) -> None:
        """So many experts start to move into slots."""
        self.count += n

    def begin_step(self, n_slots: int, few_tokens: bool) -> None:
        """A step begins. Transfers are counted over steps of few tokens: a prefill's say nothing about decode.

        In a prefill residency pays for one token only: every layer wants the link, what is brought for later delays it.
        """
        if self._counting:
            rest = 1.0 - TRANSFER_WEIGHT
            self._transfers_a_token = rest * self._transfers_a_token + TRANSFER_WEIGHT * self.count
        self.count, self._counting = 0, few_tokens
        self.horizon = self._expected(n_slots if few_tokens else 0)

    def _expected(self, n_slots: int) -> float:
        lifetime = n_slots / max(self._transfers_a_token, LEAST_TRANSFERS)
        return max(self.horizon_scale * math.sqrt(lifetime), 1.0)

"""How long an expert keeps its slot: the tokens over which its residency pays.

A resident leaves with the chance 1 / lifetime at each token, where lifetime = slots / transfers a token. Its worth is
the uses expected over a part of that time.
"""

from __future__ import annotations

from typing import Final

LIFETIME_SHARE: Final = 0.08
"""Part of the expected lifetime over which residency pays (gpt-oss-20b, tuning part): one that is wanted again comes
back soon, so the later part of its stay is no saving."""
TRANSFER_WEIGHT: Final = 0.02
"""Weight of the newest token in the mean number of transfers a token."""
FIRST_TRANSFERS: Final = 1.0
"""Transfers a token that are assumed before any was seen."""
LEAST_TRANSFERS: Final = 1e-3


class Residency:
    """Counts transfers; ``horizon``: tokens over which residency pays now."""

    def __init__(self, n_slots: int, lifetime_share: float = LIFETIME_SHARE) -> None:
        self._transfers_a_token, self._count, self._counting = FIRST_TRANSFERS, 0, False
        self.lifetime_share = lifetime_share
        self.horizon = self._expected(n_slots)

    def transferred(self) -> None:
        """An expert starts to move into a slot."""
        self._count += 1

    def begin_step(self, n_slots: int, few_tokens: bool) -> None:
        """A step begins. Transfers are counted over steps of few tokens: a prefill's say nothing about decode.

        In a prefill residency pays for one token only: every layer wants the link, what is brought for later delays it.
        """
        if self._counting:
            rest = 1.0 - TRANSFER_WEIGHT
            self._transfers_a_token = rest * self._transfers_a_token + TRANSFER_WEIGHT * self._count
        self._count, self._counting = 0, few_tokens
        self.horizon = self._expected(n_slots if few_tokens else 0)

    def _expected(self, n_slots: int) -> float:
        lifetime = n_slots / max(self._transfers_a_token, LEAST_TRANSFERS)
        return max(self.lifetime_share * lifetime, 1.0)

"""How long an expert keeps its slot, and what that makes of its moving means of use.

A resident leaves with the chance 1 / lifetime at each token, where lifetime = slots / transfers a token. Its worth is
the uses expected until then. A moving mean of use with weight w fades by 1 - w a token, so over ``horizon`` tokens the
share c of it that forecasts the next token is worth c / (1 - (1 - 1 / horizon) * (1 - w)) uses.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

WEIGHTS: Final = (0.4, 0.05, 0.02)
"""Weights of the newest token in the fast, the slow and the very slow moving mean of use."""
MIX: Final = (0.32, 0.48, 0.20)
"""Least-squares share of each mean in the chance of use at the next token (gpt-oss-20b, tuning part)."""
LIFETIME_SHARE: Final = 0.2
"""Part of the expected lifetime over which residency pays (gpt-oss-20b, tuning part): one that is wanted again comes
back soon, so the later part of its stay is no saving."""
TRANSFER_WEIGHT: Final = 0.02
"""Weight of the newest token in the mean number of transfers a token."""
FIRST_TRANSFERS: Final = 1.0
"""Transfers a token that are assumed before any was seen."""
LEAST_TRANSFERS: Final = 1e-3


class Residency:
    """Counts transfers; ``factors`` float64[3]: uses to come for each unit of the three moving means."""

    def __init__(self, n_slots: int, lifetime_share: float = LIFETIME_SHARE) -> None:
        self._mix, self._fade = np.array(MIX), 1.0 - np.array(WEIGHTS)
        self._transfers_a_token, self._count, self._counting = FIRST_TRANSFERS, 0, False
        self.lifetime_share = lifetime_share
        self.factors: npt.NDArray[np.float64] = np.array(MIX)
        self._expect(n_slots)

    @property
    def horizon(self) -> float:
        """Tokens over which residency pays now."""
        return self._horizon

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
        self._expect(n_slots if few_tokens else 0)

    def _expect(self, n_slots: int) -> None:
        lifetime = n_slots / max(self._transfers_a_token, LEAST_TRANSFERS)
        self._horizon = max(self.lifetime_share * lifetime, 1.0)
        self.factors = self._mix / (1.0 - (1.0 - 1.0 / self._horizon) * self._fade)

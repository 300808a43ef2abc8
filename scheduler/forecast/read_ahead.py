"""Which experts of later layers are worth a read from disk that nobody waits for yet.

Gates say it where there are some, else the forecast of use. A read ahead takes the place of another expert in host
memory and the disk's time: how often forecasts come true, and how long calls wait for the disk, is measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.demand import Prediction

Ids = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

MAX_AHEAD = 4
"""Reads for later layers that are queued or running: no more, since each takes a slot from an expert."""
LAYERS_AHEAD = 2
"""Following layers whose gates are asked. The slots that reads for later ones take are worth more."""
MIN_CHANCE = 0.25
"""A forecast below this is not read for."""
FIRST_CHANCE = 0.6
"""How often gates are right about a later layer, before that was seen."""
CHANCE_RATE = 0.05
"""Weight of the newest layer in that, and in the share of time that calls wait for reads."""


class ReadAhead:
    """Experts are keys, layer * n_experts + expert. expected bool [layers * experts]: what is foretold of the layers
    whose turn is still to come. chances float64 [layers + 1]: how often gates were right, by distance in layers."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._n_experts = n_experts
        self.expected = np.zeros(n_layers * n_experts, np.bool_)
        self._told: list[list[tuple[int, Ids]]] = [[] for _ in range(n_layers)]
        self.chances = np.full(n_layers + 1, FIRST_CHANCE)
        self._wishes: deque[tuple[int, float]] = deque()
        self._clock_us, self._wait_share = 0.0, 0.0

    def judge(self, layer: int, active: Ids) -> None:
        """A layer's turn has come with these experts: what gates said of it is compared, and no longer expected."""
        for distance, ids in self._told[layer]:
            right = float(np.isin(ids, active).mean()) if ids.size else 1.0
            self.chances[distance] += CHANCE_RATE * (right - self.chances[distance])
        self._told[layer].clear()
        self.expected[layer * self._n_experts : (layer + 1) * self._n_experts] = False

    def by_odds(self, layer: int, odds: npt.NDArray[np.float32], there: Bools) -> None:
        """Without gates: the log-odds [E] of the forecast of use say what a layer needs. there bool [layers * experts]:
        what is in memory or being read."""
        chances = 1.0 / (1.0 + np.exp(-odds.astype(np.float64)))
        likely = np.flatnonzero(chances >= MIN_CHANCE)
        likely = likely[np.argsort(-chances[likely], kind="stable")]
        self._wishes.clear()
        self._wish(layer, likely, chances[likely], there)

    def by_gates(self, layer: int, predictions: Sequence[Prediction], there: Bools) -> None:
        """What gates say of the layers behind `layer`, nearest first, takes the place of other forecasts."""
        self._wishes.clear()
        for prediction in predictions:
            ids = prediction.expert_ids[np.argsort(-prediction.n_tokens * prediction.scores, kind="stable")]
            distance = prediction.layer - layer
            self._told[prediction.layer].append((distance, ids.copy()))
            self._wish(prediction.layer, ids, np.full(ids.size, self.chances[distance]), there)

    def take(self) -> tuple[int, float] | None:
        """The next key that is worth a read, and how many uses it gains; None where there is none.

        Where calls wait for the disk most of the time, a read for nothing costs as much as one that was right saves.
        """
        while self._wishes:
            key, chance = self._wishes.popleft()
            gain = chance - self._wait_share * (1.0 - chance)
            if chance >= MIN_CHANCE and gain > 0.0:
                return key, gain
        return None

    def forget(self) -> None:
        """Nothing more of what is foretold now is worth a read."""
        self._wishes.clear()

    def note_time(self, now_us: float, waited_us: float) -> None:
        """A call begins; calls have waited so long for reads since the one before."""
        passed_us = now_us - self._clock_us
        if self._clock_us and passed_us > 0.0:
            share = min(waited_us / passed_us, 1.0)
            self._wait_share += CHANCE_RATE * (share - self._wait_share)
        self._clock_us = now_us

    def _wish(self, layer: int, ids: Ids, chances: npt.NDArray[np.float64], there: Bools) -> None:
        keys = layer * self._n_experts + ids.astype(np.int64)
        self.expected[keys] = True
        missing = ~there[keys]
        self._wishes.extend(zip(keys[missing].tolist(), chances[missing].tolist(), strict=True))

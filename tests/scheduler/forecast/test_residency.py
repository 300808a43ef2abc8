"""How long residents stay, counted from transfers."""

from __future__ import annotations

import math

import pytest

from scheduler.forecast.residency import FIRST_TRANSFERS, HORIZON_SCALE, TRANSFER_WEIGHT, Residency


def test_before_any_transfer_the_assumed_rate_counts() -> None:
    assert Residency(100).horizon == pytest.approx(HORIZON_SCALE * math.sqrt(100 / FIRST_TRANSFERS))
    assert Residency(0).horizon == 1.0


def test_transfers_shorten_the_stay_and_idle_steps_lengthen_it() -> None:
    residency = Residency(100)
    residency.begin_step(100, few_tokens=True)
    for _ in range(5):
        residency.transferred()
    residency.begin_step(100, few_tokens=True)
    rate = (1 - TRANSFER_WEIGHT) * FIRST_TRANSFERS + TRANSFER_WEIGHT * 5
    assert residency.horizon == pytest.approx(HORIZON_SCALE * math.sqrt(100 / rate))
    before = residency.horizon
    residency.begin_step(100, few_tokens=True)
    assert residency.horizon > before


def test_a_prefill_says_nothing_about_decode() -> None:
    residency = Residency(100)
    before = residency.horizon
    residency.begin_step(100, few_tokens=False)
    assert residency.horizon == 1.0
    residency.transferred()
    residency.begin_step(100, few_tokens=True)
    assert residency.horizon == before

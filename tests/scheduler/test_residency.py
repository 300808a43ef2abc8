"""How long residents stay, counted from transfers, and what a moving mean of use is worth over that time."""

from __future__ import annotations

import pytest

from scheduler.residency import FIRST_TRANSFERS, LIFETIME_SHARE, MIX, TRANSFER_WEIGHT, WEIGHTS, Residency


def test_before_any_transfer_the_assumed_rate_counts() -> None:
    assert Residency(100).horizon == pytest.approx(LIFETIME_SHARE * 100 / FIRST_TRANSFERS)
    assert Residency(0).horizon == 1.0
    assert Residency(0).factors.tolist() == pytest.approx(list(MIX))


def test_transfers_shorten_the_stay_and_idle_steps_lengthen_it() -> None:
    residency = Residency(100)
    residency.begin_step(100, few_tokens=True)
    for _ in range(5):
        residency.transferred()
    residency.begin_step(100, few_tokens=True)
    rate = (1 - TRANSFER_WEIGHT) * FIRST_TRANSFERS + TRANSFER_WEIGHT * 5
    assert residency.horizon == pytest.approx(LIFETIME_SHARE * 100 / rate)
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


def test_factors_by_hand() -> None:
    """Horizon 10: 9 / 10 of each mean's rest survives a token."""
    residency = Residency(10, lifetime_share=1.0)
    assert residency.horizon == 10.0
    assert residency.factors.tolist() == pytest.approx(
        [c / (1 - 0.9 * (1 - w)) for c, w in zip(MIX, WEIGHTS, strict=True)]
    )

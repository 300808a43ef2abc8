"""The table of held-out figures is what ``benchmarks/heldout.py`` makes of docs/heldout.json."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def heldout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heldout", ROOT / "benchmarks" / "heldout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_recorded_figures(heldout: ModuleType) -> None:
    data = json.loads(heldout.JSON_FILE.read_text(encoding="utf-8"))
    page = heldout.PAGE.read_text(encoding="utf-8")
    assert heldout.with_table(page, heldout.table(data)) == page, "run: python benchmarks/heldout.py --tables"
    assert data["kind"] == "simulated"


def test_the_table_by_hand(heldout: ModuleType) -> None:
    """ours takes 50 ms, static 100, FreeToken 60, the best schedule 37, the bound is 30: ours saves 50 of 63 and of
    70, the best 63 of 70."""
    times = {"static": 100.0, "freetoken": 60.0, "ours": 50.0, "oracle": 40.0}
    decode = [
        {"hardware": hardware, "share": share, "policy": policy, "latency_ms": ms, "prefetch_precision": 0.8,
         "prefetches": 9 * (share < 0.5), "bound_ms": 30.0, "best_ms": 37.0}
        for hardware in heldout.ORDER
        for share in heldout.SHARES
        for policy, ms in times.items()
    ]  # fmt: skip
    rates = {"lru, one pool": 0.6, "lru, slots a layer": 0.7, "value": 0.7, "belady": 0.8}
    hits = [{"cache": c, "share": s, "hit_rate": r} for c, r in rates.items() for s in heldout.SHARES]
    data = {"tokens": 1000, "held_out_tokens": 5000, "model": "openai/x", "decode": decode, "hits": hits}
    text = heldout.table({"traces": [data, {**data, "model": "y"}]})
    assert "| laptop | 2.00 / 2.00 | 1.20 / 1.20 | 79 % / 79 % | 71 % / 71 % | 90 % / 90 % | 80 % / - |" in text
    assert "a real y trace" in text
    assert "50 % / 50 % of the way from the first LRU,\n0 % / 0 % from the second" in text
    assert "1,000 tokens" in text


def test_a_page_without_markers_is_refused(heldout: ModuleType) -> None:
    with pytest.raises(ValueError, match="no markers"):
        heldout.with_table("nothing", "table")


def test_the_halves_do_not_overlap(heldout: ModuleType) -> None:
    from scheduler.traces.synthetic import generate

    profile, held = heldout.parts(generate(2, 8, 2, 4, 8))
    assert set(profile.sequence.tolist()).isdisjoint(held.sequence.tolist())
    assert (len(profile.sequence_spans()), len(held.sequence_spans())) == (2, 4)
    single = generate(2, 8, 2, 20, 1)
    profile, held = heldout.parts(single)
    assert (profile.expert_ids == single.expert_ids[:5]).all()
    assert (held.expert_ids == single.expert_ids[10:]).all()

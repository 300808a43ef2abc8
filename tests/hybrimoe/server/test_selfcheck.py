"""What a server tells of slots, CPU lane and link after some tokens."""

import asyncio

import pytest

from hybrimoe.runtime.layer_call.stats import Counters
from hybrimoe.server.selfcheck import CHECKED_TOKENS, findings


def told(n_slots=16, slots_filled=16, **counted):
    stats = {"n_slots": n_slots, "n_experts": 64, "slots_filled": slots_filled, "accelerator_kind": "cuda",
             "decode": Counters(**counted).as_dict()}  # fmt: skip
    return {one["about"]: (one["good"], one["text"]) for one in findings(stats)}


BUSY = {"activated": 100, "hits": 60, "misses": 40, "cpu_experts": 40, "accel_experts": 60, "cpu_us": 4000.0}


def test_a_cache_that_helps_and_one_that_does_not():
    good, text = told(**BUSY)["cache"]
    assert good
    assert "engaged: 60% of the experts" in text
    assert "slots for 25% of all" in text
    good, text = told(**BUSY | {"hits": 24, "misses": 76})["cache"]
    assert not good
    assert "does not help: 24%" in text
    assert told(slots_filled=0, **BUSY)["cache"] == (False, "the cache is empty: no slot holds an expert")
    assert told(n_slots=64, **BUSY | {"hits": 100, "misses": 0})["cache"][0]


def test_the_cpu_lane_against_an_upload():
    uploads = {"transfers": 10, "link_us": 5000.0}
    good, text = told(**BUSY, **uploads)["cpu_lane"]
    assert good
    assert "40% of the experts in 100 us each, an upload takes 500 us" in text
    good, text = told(**BUSY | {"cpu_us": 40000.0}, **uploads)["cpu_lane"]
    assert not good
    assert "1000 us each, an upload takes 500 us" in text
    assert told(n_slots=0, **BUSY)["cpu_lane"][0]
    assert "nothing to do" in told(**BUSY | {"cpu_experts": 0})["cpu_lane"][1]


def test_the_link_that_is_used_is_off_or_is_too_slow():
    assert "uploads are off" in told(**BUSY)["link"][1]
    assert "10 uploads in 500 us" in told(**BUSY, transfers=10, link_us=5000.0)["link"][1]
    late = {"prefetches": 10, "prefetches_used": 2, "prefetches_wasted": 8, "link_us": 5000.0}
    assert told(**BUSY, **late)["link"] == (
        False, "the link is too slow for prefetching: 10 uploads in 500 us each, most of them not used in time",
    )  # fmt: skip


@pytest.mark.parametrize("stats", [None, {}, {"n_slots": 4, "decode": Counters().as_dict()}])
def test_nothing_is_told_before_there_is_something(stats):
    assert findings(stats) == []


def test_the_server_tells_it_once_in_its_log_and_in_health(application, client, generator, caplog):
    async def run():
        app, served = application()
        counted = Counters(**BUSY).as_dict()
        served.experts = lambda: {"n_slots": 16, "n_experts": 64, "slots_filled": 16, "decode": counted}
        async with client(app) as http:
            first = (await http.get("/health")).json()["findings"]
            body = {"prompt": "It was", "max_tokens": CHECKED_TOKENS, "ignore_eos": True}
            for _ in range(2):
                await http.post("/v1/completions", json=body)
            return first, (await http.get("/health")).json()["findings"]

    with caplog.at_level("INFO", "hybrimoe.server"):
        before, after = asyncio.run(run())
    assert before == []
    assert [one["about"] for one in after] == ["cache", "cpu_lane", "link"]
    assert len([record for record in caplog.records if "the cache is engaged" in record.message]) == 1

"""The cache of a packed file in host memory: its bytes, its budget, reads ahead, and what leaves for what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cpu_kernels import Activation, ExpertSpec
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import LayerSpec
from hybrimoe.runtime.tier.cache import HostCache
from hybrimoe.runtime.tier.reader import RecordReader
from hybrimoe.runtime.tier.slots import RecordPlaces
from scheduler.demand import LayerDemand, Prediction

N_LAYERS, N_EXPERTS = 3, 8
SPEC = ExpertSpec(hidden=32, inter=32, dtype="int4", activation=Activation())
"""A record that is no multiple of a block: its bytes begin inside of one."""


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[Callable[..., HostCache]]:
    """A cache of `n_slots` over a file of random bytes."""
    caches = []

    def make(n_slots: int, spec: ExpertSpec = SPEC, n_layers: int = N_LAYERS, **options: Any) -> HostCache:
        layers = [LayerSpec(f"layers.{index}", spec, N_EXPERTS) for index in range(n_layers)]
        path = tmp_path / "experts.hybrimoe"
        n_bytes = sum(layer.nbytes for layer in layers)
        record_file.write(path, np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8), {})
        places = RecordPlaces.of(path, layers, record_file.PAGE_BYTES)
        caches.append(HostCache(places, RecordReader(path, **options), n_slots))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def in_file(cache: HostCache, layer: int, expert: int) -> np.ndarray:
    offset, size = cache.places.record(layer, expert)
    return np.fromfile(cache.places.path, np.uint8, size, offset=offset)


def demand(layer: int, ids: list[int], n_tokens: int = 1) -> LayerDemand:
    phase = "decode" if n_tokens == 1 else "prefill"
    each = np.full(len(ids), max(n_tokens // len(ids), 1), np.int32)
    return LayerDemand(layer, phase, n_tokens, np.array(ids, np.int32), each, np.zeros(N_EXPERTS, np.float32))


def compute(cache: HostCache, layer: int, ids: list[int], n_tokens: int = 1) -> int:
    """A call of a layer, with a look at the bytes in place of computing. Returns the number of missing experts."""
    n_missing = cache.demand(demand(layer, ids, n_tokens), np.array(ids))
    left = np.array(ids)
    while left.size:
        there = cache.ready(layer, left)
        for expert in left[there].tolist():
            assert np.array_equal(cache.record(layer, expert), in_file(cache, layer, expert))
        cache.hold(layer, [])
        cache.done(layer, left[there])
        left = left[~there]
    return n_missing


@pytest.mark.parametrize("direct", [True, False])
def test_each_record_is_what_the_file_has(make_cache: Callable[..., HostCache], direct: bool) -> None:
    cache = make_cache(8, direct=direct)
    assert SPEC.record_bytes % 4096 != 0
    order = np.random.default_rng(1).permutation(N_LAYERS * N_EXPERTS)
    for key in [*order, *order[:5]]:
        layer, expert = divmod(int(key), N_EXPERTS)
        assert compute(cache, layer, [expert]) in (0, 1)
    assert cache.state().held == 8
    assert cache.state().direct in (direct, False)


def test_a_call_of_more_experts_than_fit_is_computed_in_turns(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(3)
    for layer in (0, 1, 2, 0):
        assert compute(cache, layer, list(range(N_EXPERTS)), n_tokens=64) >= N_EXPERTS - 3


def test_a_planner_is_told_what_waits_for_the_disk(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(12)
    compute(cache, 0, [1])
    told = replace(demand(0, [1, 2, 5, 7]), n_tokens=np.array([1, 1, 4, 1], np.int32))
    cache.demand(told, np.array([1, 2, 5]))  # 7 is in a slot
    view = cache.view(0, told.expert_ids, 10.0)
    assert view is not None
    assert view.waits_us[0] == 0.0
    assert view.waits_us[2] <= 10.0, "the heaviest load is read first"
    assert view.waits_us[1] <= 20.0
    assert np.isinf(view.waits_us[3])
    assert view.reads[-2:] == ((0, 5), (0, 2))
    assert view.held[1]
    assert not view.held[7]
    cache.ready(0, np.array([2]))
    assert cache.has(0, 2)
    assert not cache.has(0, 7)
    everything = make_cache(N_LAYERS * N_EXPERTS)
    for layer in range(N_LAYERS):
        compute(everything, layer, list(range(N_EXPERTS)))
    assert everything.view(0, np.arange(3), 10.0) is None
    assert everything.read_took_us() > 0.0


def test_memory_stays_within_the_budget(make_cache: Callable[..., HostCache]) -> None:
    """96 MiB of records through 16 MiB of memory."""
    spec = ExpertSpec(hidden=512, inter=512, dtype="float32", activation=Activation())
    cache = make_cache(5, spec, n_layers=4)
    process = psutil.Process()
    compute(cache, 0, [0])
    before, most = process.memory_info().rss, 0
    for _ in range(2):
        for layer in range(4):
            for expert in range(N_EXPERTS):
                cache.hold(layer, [expert])
                most = max(most, process.memory_info().rss)
    assert cache.slots.nbytes == 5 * spec.record_bytes
    assert most - before < cache.slots.nbytes + (4 << 20)


def test_what_is_used_often_stays(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(8)
    for token in range(60):
        for layer in range(N_LAYERS):
            rare = 2 + (token % 6)
            compute(cache, layer, [0, 1] if token % 2 else [0, rare])
    assert [compute(cache, layer, [0, 1]) for layer in range(N_LAYERS)] == [0, 0, 0]


def test_what_gates_foretell_is_read_before_it_is_needed(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(12)
    ones = np.ones(2, np.float32)
    ids = np.array([2, 5], np.int32)
    cache.demand(demand(0, [1]), np.array([1]))
    cache.foretell(0, (Prediction(1, ids, ones, ones), Prediction(2, ids, ones, ones)))
    cache.ready(0, np.array([1]))
    cache.done(0, np.array([1]))
    while cache.state().held < 5:
        cache.reader.wait()
        cache.take_ended()
    assert compute(cache, 1, [2, 5]) == 0
    assert compute(cache, 2, [2, 5]) == 0


def test_a_forecast_that_was_wrong_is_cancelled_or_thrown_out(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(8)
    for token in range(20):
        for layer in range(N_LAYERS):
            n = cache.demand(demand(layer, [token % 4]), np.array([token % 4]))
            wrong = np.array([4 + token % 4, 4 + (token + 1) % 4], np.int32)
            ones = np.ones(2, np.float32)
            if layer + 1 < N_LAYERS:
                cache.foretell(layer, (Prediction(layer + 1, wrong, ones, ones),))
            assert n <= 1
            cache.ready(layer, np.array([token % 4]))
            cache.done(layer, np.array([token % 4]))
    assert cache.ahead.chances[1] < 0.3, "forecasts that never come true are still believed"


def test_the_number_of_slots_can_change(make_cache: Callable[..., HostCache]) -> None:
    cache = make_cache(8)
    for layer in range(N_LAYERS):
        compute(cache, layer, [0, 1, 2])
    for n_slots in (4, 24, 10, 3, 8):
        cache.resize(n_slots)
        assert cache.state().held <= n_slots == cache.slots.n_slots
        for layer in range(N_LAYERS):
            for expert in np.flatnonzero(cache.addresses[layer]).tolist():
                assert np.array_equal(cache.record(layer, expert), in_file(cache, layer, expert))
            cache.hold(layer, [])
            compute(cache, layer, [1, 5])


class SlowLink:
    """Copies of some experts that do not end."""

    def __init__(self, experts: Collection[tuple[int, int]], n_keys: int) -> None:
        self.experts, self.n_keys = experts, n_keys

    def being_copied(self) -> Collection[tuple[int, int]]:
        return self.experts

    def wait_for_one(self) -> None:
        raise AssertionError("nothing that leaves is being copied")

    def in_slots(self) -> np.ndarray:
        return np.zeros(self.n_keys, np.bool_)


def test_fewer_slots_do_not_wait_for_copies(make_cache: Callable[..., HostCache]) -> None:
    """A link may have a second's work in its queue; what it reads stays where it is, in whichever slot."""
    cache = make_cache(8)
    for layer, experts in enumerate(([0, 1, 2], [0, 1, 2], [0, 1])):
        compute(cache, layer, experts)
    copied = [(2, 0), (2, 1), (0, 2)]
    places = [int(cache.addresses[layer][expert]) for layer, expert in copied]
    cache.copies = SlowLink(copied, N_LAYERS * cache.places.n_experts)
    cache.resize(4)
    assert cache.state().held == 4
    assert [int(cache.addresses[layer][expert]) for layer, expert in copied] == places
    for layer, expert in copied:
        assert np.array_equal(cache.record(layer, expert), in_file(cache, layer, expert))


def test_slots_that_are_given_up_are_the_systems_again(make_cache: Callable[..., HostCache]) -> None:
    spec = ExpertSpec(hidden=512, inter=512, dtype="float32", activation=Activation())
    cache = make_cache(16, spec, n_layers=4)
    for layer in range(4):
        compute(cache, layer, [0, 1, 2, 3])
    process = psutil.Process()
    before = process.memory_info().rss
    cache.resize(4)
    assert before - process.memory_info().rss > 11 * spec.record_bytes


def test_an_error_of_the_call_before_is_not_that_of_the_next(make_cache: Callable[..., HostCache]) -> None:
    """A read that fails after its call has ended is made again by the call that needs it next."""
    cache = make_cache(8, n_threads=1)
    cache.demand(demand(0, [1]), np.array([1]))
    late = cache._reading[1]
    cache.reader.wait()
    late.error = CheckpointError("of a file that was cut")
    cache.hold(0, [1])  # as a session does that recovers
    assert cache.failed == 1
    assert cache.ready(0, np.array([1])).all()

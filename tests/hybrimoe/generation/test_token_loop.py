"""A token without Python: the compiled loop on fake cards, whose driver judges what it submits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numba
import pytest
from transformers import PreTrainedTokenizerFast

import hybrimoe.runtime.layer_call.call
import hybrimoe.runtime.layer_call.lanes
import hybrimoe.runtime.layer_call.reports
import hybrimoe.runtime.token_loop.loop
from cpu_kernels.engine.waiting import CLOCK, MEMORY
from cpu_kernels.jit.primitives import int64s_at
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.token_loop.loop import TokenLoop
from hybrimoe.step.pieces import Pieces
from scheduler import HardwareProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, LinkProfile
from tests.fake_device import Cards, ManualClock, fake_cards
from tests.fake_device.driver import FakeDriver
from tests.fake_device.graphs import CardGraphs
from tests.hybrimoe.generation.test_on_cards import N_TOKENS, ONE, greedy, own_cache, save_model

__all__ = ["own_cache"]
STEPS = N_TOKENS - 1
FROZEN_NS = 1_000_000_000
SLOW_LINK_GBPS = 1e-3
COSTS = HardwareProfile(
    name="test", provenance="datasheet",
    cpu=CpuProfile(read_gbps=0.5, gflops=dict.fromkeys(("float32", "bfloat16", "int8", "int4"), 20.0)),
    accel=AccelProfile(mem_gbps=2.0, tflops=1.0, launch_us=1.0), link=LinkProfile(gbps=1.2, latency_us=1.0),
)  # fmt: skip
"""By which each lane has work: some 50, 12 and 20 us an expert."""
UNWATCHED = 1 << 40
"""Steps from one correction of the costs to the next: none."""


class Run:
    """A reply on a fake card, by costs that give both lanes work: tokens, statistics, the pieces of its step, and what
    slots and counters were after each token. latest: the one whose reply goes on."""

    latest: ClassVar[Run | None] = None

    def __init__(self, cards: Cards, directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> None:
        self.step: Any = None
        self.prepare: Callable[[Any], None] = options.pop("prepare", lambda model: None)
        self.told: list[Any] = []
        settings: dict[str, Any] = {"accelerator": ONE, "gpu_expert_slots": 12, "policy": "ours", "backend": "numba"}
        Run.latest = None
        self.tokens, self.stats = greedy(directory, tokenizer, self._begin, **settings | options)

    def _begin(self, model: Any) -> None:
        self.step = model.hybrimoe.step
        assert self.step is not None, model.hybrimoe.way
        self.planner = model.hybrimoe.session._runner.planner
        self.prepare(model)
        Run.latest = self

    def note(self) -> None:
        """Slots, and the events that led to them, as they are now."""
        slots, stats = self.planner.slots, self.step.session._stats
        decode = [vars_of(counters) for counters in stats.counters["decode"]]
        self.told.append((slots.told.tolist(), slots.key_of.tolist(), slots.state.tolist(), decode))

    @property
    def pieces(self) -> Pieces:
        pieces: Pieces = self.step._captured[-1]
        return pieces

    @property
    def loop(self) -> TokenLoop:
        assert self.pieces.loop is not None, self.pieces.no_loop
        return self.pieces.loop

    @property
    def driver(self) -> FakeDriver:
        driver = self.loop._driver
        assert isinstance(driver, FakeDriver)
        return driver


def vars_of(counters: Any) -> list[float]:
    """What counters count, times aside."""
    names = (
        "calls", "tokens", "activated", "hits", "misses", "late_prefetches", "cpu_experts", "accel_experts",
        "transfers", "prefetches", "prefetches_used", "prefetches_wasted", "transfer_bytes",
    )  # fmt: skip
    return [getattr(counters, name) for name in names]


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    number = count()

    def started(cards: Cards, **options: Any) -> Run:
        """A model of its own each time: what is learnt of a model's routing is kept beside it."""
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        monkeypatch.setattr("hybrimoe.runtime.startup.startup.measure_profile", lambda *args: COSTS)
        return Run(cards, save_model(tmp_path / f"model {next(number)}", "float32"), byte_tokenizer, **options)

    return started


@pytest.fixture
def expected(run: Callable[..., Run]) -> list[int]:
    """What Python's way says."""
    with pytest.MonkeyPatch.context() as patch, fake_cards(1) as cards:
        patch.setattr("hybrimoe.step.captured.CapturedStep._loop_over", lambda step, pieces: None)
        found = run(cards)
        assert found.pieces.loop is None
        return found.tokens


@numba.cfunc(numba.int64(numba.int64, numba.int64))
def _frozen_clock(_kind: int, seconds_and_ns: int) -> int:
    words = int64s_at(seconds_and_ns, 2)
    words[0], words[1] = 1, 0
    return 0


def _whole_copies_us(queue: TransferQueue, _now_us: float, transfer_us: Callable[[int], float]) -> float:
    """`TransferQueue.busy_us` where nothing of a copy has gone by yet."""
    return sum(transfer_us(item.transfer.layer) for item in queue.pending)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's time does not go by, so that plans hang on nothing but routing and costs, which nothing corrects."""
    for module in (hybrimoe.runtime.layer_call.call, hybrimoe.runtime.layer_call.lanes):
        monkeypatch.setattr(module, "perf_counter_ns", lambda: FROZEN_NS)
    for module in (
        hybrimoe.runtime.layer_call.reports, hybrimoe.runtime.layer_call.lanes, hybrimoe.runtime.token_loop.loop,
    ):  # fmt: skip
        monkeypatch.setattr(module, "OBSERVE_EVERY", UNWATCHED)
    monkeypatch.setattr(TransferQueue, "busy_us", _whole_copies_us)
    before = MEMORY[CLOCK // 8]
    MEMORY[CLOCK // 8] = ctypes.cast(_frozen_clock.ctypes, ctypes.c_void_p).value
    yield
    MEMORY[CLOCK // 8] = before


@pytest.mark.parametrize("slots", [2, 5, 12, 24])
@pytest.mark.parametrize("link_gbps", [8.0, SLOW_LINK_GBPS])
def test_every_decision_is_that_of_python(
    run: Callable[..., Run], still: None, monkeypatch: pytest.MonkeyPatch, slots: int, link_gbps: float
) -> None:
    """After each token: the same events of slots in the same order, the same counters."""
    found: list[Run] = []
    own = Pieces.run

    def noted(pieces: Pieces, *args: Any) -> Any:
        logits = own(pieces, *args)
        if Run.latest is not None:
            Run.latest.note()
        return logits

    monkeypatch.setattr(Pieces, "run", noted)
    for looped in (True, False):
        if not looped:
            monkeypatch.setattr("hybrimoe.step.captured.CapturedStep._loop_over", lambda step, pieces: None)
        with fake_cards(1, clock=ManualClock(), link_gbps=link_gbps) as cards:
            found.append(run(cards, gpu_expert_slots=slots))
    mine, theirs = found
    assert mine.loop.n_tokens >= STEPS - 1
    assert mine.tokens == theirs.tokens
    assert len(mine.told) == len(theirs.told) == STEPS
    for number, (one, other) in enumerate(zip(mine.told, theirs.told, strict=True)):
        assert one == other, f"after token {number}"
    total = mine.stats.by_phase["decode"]
    assert min(total.accel_experts, total.cpu_experts, total.transfers + total.prefetches) > 0

"""A token without Python: the compiled loop on fake cards, whose driver judges what it submits."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numba
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hybrimoe
import hybrimoe.runtime.layer_call.call
import hybrimoe.runtime.layer_call.lanes
import hybrimoe.runtime.layer_call.reports
import hybrimoe.runtime.token_loop.hand_over
from cpu_kernels.engine.waiting import CLOCK, MEMORY
from cpu_kernels.jit.primitives import int64s_at
from gpu_kernels import LostError
from gpu_kernels.driver.functions import COPY, LAUNCH
from gpu_kernels.driver.functions import driver_of as real_driver_of
from gpu_kernels.driver.queue import SLOTS, STRIDE
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.runtime.exchanged import ExchangedExperts
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.lanes import Lanes
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.token_loop import compiled as at_place
from hybrimoe.runtime.token_loop.loop import TokenLoop
from hybrimoe.step.pieces import Pieces
from scheduler import HardwareProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, LinkProfile
from tests.fake_device import Cards, ManualClock, fake_cards
from tests.fake_device.driver import FakeDriver
from tests.fake_device.fused import StreamedKernels
from tests.fake_device.graphs import CardGraph, CardGraphs
from tests.fake_device.streams import FakeStream, join
from tests.hybrimoe.generation.test_on_cards import N_LAYERS, N_TOKENS, ONE, PROMPT, greedy, own_cache, save_model

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
FAST_LINK = replace(COSTS, link=LinkProfile(gbps=100.0, latency_us=0.0))
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
    """The host's time does not go by, so that plans hang on nothing but routing and costs, which nothing corrects.
    Copies that Python submits are no later than the loop's, which wait for no launch."""
    for module in (hybrimoe.runtime.layer_call.call, hybrimoe.runtime.layer_call.lanes):
        monkeypatch.setattr(module, "perf_counter_ns", lambda: FROZEN_NS)
    for module in (
        hybrimoe.runtime.layer_call.reports, hybrimoe.runtime.layer_call.lanes, hybrimoe.runtime.token_loop.hand_over,
    ):  # fmt: skip
        monkeypatch.setattr(module, "OBSERVE_EVERY", UNWATCHED)
    monkeypatch.setattr(TransferQueue, "busy_us", _whole_copies_us)
    monkeypatch.setattr(FakeStream, "wait_stream", lambda stream, other: join(stream.seen, other.seen))
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
    assert min(total.accel_experts, total.transfers + total.prefetches) > 0
    assert total.cpu_experts > 0 or link_gbps > SLOW_LINK_GBPS, "where copies take no time, each expert gets a slot"


def test_a_token_asks_the_driver_for_little(run: Callable[..., Run]) -> None:
    """A layer is two launches and two copies of routing and rows that are part of them, and nothing else is the
    host's: no call of torch, no wait that Python makes."""
    before: list[tuple[Counter[int], Counter[str]]] = []

    def noted(pieces: Pieces, *args: Any, own: Any = Pieces.run) -> Any:
        driver = Run.latest and Run.latest.pieces.loop and Run.latest.driver
        if not driver:
            return own(pieces, *args)
        calls, counts = driver.calls.copy(), cards.counts.copy()
        logits = own(pieces, *args)
        before.append((driver.calls - calls, cards.counts - counts))
        return logits

    with fake_cards(1) as cards, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "run", noted)
        found = run(cards)
        assert found.loop.n_tokens == found.loop.n_begun == STEPS
    for calls, counts in before[1:]:
        assert calls[LAUNCH] <= 2 * N_LAYERS + 1
        assert counts["host waits"] == counts["waits"] == 0, "the loop asks by itself"
        assert counts["copy to the card"] == 1 + calls[COPY], "the token's numbers, and experts"
        assert counts["launches"] == 0
    assert sum(calls[COPY] for calls, _ in before) > 0


def test_costs_are_corrected_and_counters_count(run: Callable[..., Run], expected: list[int]) -> None:
    with fake_cards(1) as cards:
        found = run(cards)
    assert found.tokens == expected
    total = found.stats.by_phase["decode"]
    assert (total.calls, total.activated) == (STEPS * N_LAYERS, 2 * STEPS * N_LAYERS)
    assert total.accel_experts + total.cpu_experts == total.activated
    assert total.hits + total.misses == total.activated
    assert min(total.accel_us, total.cpu_us, total.link_us, total.wall_us, total.overhead_us) > 0
    drift = found.planner.costs.drift
    assert (drift != 1.0).all(), "of CPU, accelerator and link"


def test_without_slots_the_loop_computes_all_on_the_cpu(run: Callable[..., Run], expected: list[int]) -> None:
    with fake_cards(1) as cards:
        found = run(cards, gpu_expert_slots=0)
        assert found.tokens == expected
        assert found.loop.n_tokens == found.loop.n_begun == STEPS
        assert found.driver.calls[LAUNCH] == STEPS * (N_LAYERS + 1)
        assert found.driver.calls[COPY] == 0
    total = found.stats.by_phase["decode"]
    assert (total.calls, total.tokens, total.activated) == (STEPS * N_LAYERS, STEPS * N_LAYERS, 2 * STEPS * N_LAYERS)
    assert total.cpu_experts == total.misses == total.activated
    assert min(total.cpu_us, total.wall_us, total.overhead_us) > 0


def test_python_takes_over_between_tokens_and_within(
    run: Callable[..., Run], still: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies under way go from one to the other and back, and no decision changes."""
    runs: list[Run] = []
    own, turns = TokenLoop._may_run, count()

    def noted(pieces: Pieces, *args: Any, own: Any = Pieces.run) -> Any:
        logits = own(pieces, *args)
        if Run.latest is not None:
            Run.latest.note()
        return logits

    monkeypatch.setattr(Pieces, "run", noted)
    for refused in (lambda turn: False, lambda turn: turn % 3 == 1):
        monkeypatch.setattr(TokenLoop, "_may_run", lambda loop, refused=refused: own(loop) and not refused(next(turns)))
        with fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS * 20) as cards:
            runs.append(run(cards, gpu_expert_slots=6))
    always, sometimes = runs
    assert always.loop.n_begun == STEPS > sometimes.loop.n_begun > 0
    assert sometimes.tokens == always.tokens
    for number, (one, other) in enumerate(zip(sometimes.told, always.told, strict=True)):
        assert one == other, f"after token {number}"


def test_more_copies_than_the_loop_follows_are_pythons(
    run: Callable[..., Run], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrimoe.runtime.token_loop.hand_over.MOST_TAKEN_OVER", -1)
    with fake_cards(1) as cards:
        found = run(cards)
        assert found.tokens == expected
        assert found.loop.n_begun == 0


def test_an_expert_that_takes_over_a_slot_is_pythons(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot for two experts of a layer, which are faster one after the other than on the CPU."""
    rest: list[int] = []
    own = ExpertsCall.answer_rest
    monkeypatch.setattr(
        ExpertsCall, "answer_rest", lambda one, call, *args: (rest.append(call.layer), own(one, call, *args))
    )
    monkeypatch.setattr("tests.hybrimoe.generation.test_token_loop.COSTS", FAST_LINK)
    with fake_cards(1) as cards:
        found = run(cards, gpu_expert_slots=1)
        plain, _ = found.tokens, found.loop
    monkeypatch.setattr("hybrimoe.step.captured.CapturedStep._loop_over", lambda step, pieces: None)
    with fake_cards(1) as cards:
        assert run(cards, gpu_expert_slots=1).tokens == plain
    assert len(rest) > 0


def test_without_the_wait_for_a_copy_there_is_a_race(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "_await", lambda driver, *args: 0)
    with fake_cards(1, link_gbps=SLOW_LINK_GBPS) as cards:
        run(cards, gpu_expert_slots=5, n_tokens=12)
        assert any("may not have been written yet" in finding for finding in cards.findings)
        cards.findings.clear()


def test_a_prefetch_into_a_slot_that_is_read_would_be_a_race(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the copies need no wait for: plans pin the slots that they read."""
    own, turns = FakeDriver._copy, count()

    def elsewhere(driver: FakeDriver, target: int, source: int, n_bytes: int, stream: int) -> None:
        if Run.latest is not None and Run.latest.pieces.loop is not None:
            loop = Run.latest.loop
            at, queue = int(loop._token[at_place.AT]), loop._queue.words
            if at and loop._places[at - 1, at_place.N_ACCEL] and loop._token[at_place.STAGE] == at_place.OWING:
                slots = loop.calls[at - 1].exchange.slots
                target = int(queue[SLOTS] + slots.max() * queue[STRIDE])
                next(turns)
        own(driver, target, source, n_bytes, stream)

    monkeypatch.setattr(FakeDriver, "_copy", elsewhere)
    with fake_cards(1) as cards:
        run(cards, gpu_expert_slots=5)
        assert next(turns) > 0, "prefetches right behind experts of the card"
        assert any("writes over what may still be read" in finding for finding in cards.findings)
        cards.findings.clear()


def test_without_the_wait_for_a_piece_there_is_garbage(
    run: Callable[..., Run], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which names no experts here, so that the loop leaves it to Python."""
    monkeypatch.setattr(FakeDriver, "_query", lambda driver, what: 0)
    with fake_cards(1) as cards:
        found = run(cards)
        assert found.tokens == expected
        assert found.loop.n_begun == STEPS
        assert found.loop.n_tokens < STEPS // 2
        cards.findings.clear()


def test_a_card_that_hangs_ends_the_reply_with_what_it_was(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, turns = TokenLoop._enter, count()

    def enter(loop: TokenLoop, *args: Any) -> None:
        own(loop, *args)
        if next(turns) == 5:
            loop._accelerator.wait_limit.allow(0.2)
            cards.stream().hang()

    monkeypatch.setattr(TokenLoop, "_enter", enter)
    with fake_cards(1) as cards:
        with pytest.raises(LostError, match="hangs: a piece of a decode step did not end within"):
            run(cards)
        cards.findings.clear()


@pytest.mark.parametrize("function", ["_launch", "_copy", "_record", "_await", "_query"])
def test_what_the_driver_refuses_is_told(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    own, turns = getattr(FakeDriver, function), count()

    def refused(driver: FakeDriver, *args: int) -> int:
        if Run.latest is not None and next(turns) > 3:
            raise RuntimeError("an illegal memory access was encountered")
        found: int = own(driver, *args)
        return found

    monkeypatch.setattr(FakeDriver, function, refused)
    with fake_cards(1) as cards:
        with pytest.raises(LostError, match="an illegal memory access was encountered \\(error 999 of the driver\\)"):
            run(cards, gpu_expert_slots=5)
        cards.findings.clear()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": "hybrimoe"}, "only policy `ours` decides in compiled code"),
        ({"backend": "torch"}, "not computed by the numba backend"),
        ({"backend": "torch", "gpu_expert_slots": 0}, "not computed by the numba backend"),
    ],
)
def test_why_there_is_no_loop_is_told(run: Callable[..., Run], options: dict[str, Any], reason: str) -> None:
    ways: list[str] = []
    with fake_cards(1) as cards:
        found = run(cards, prepare=lambda model: ways.append(model.hybrimoe.way.layers["model"]), **options)
        assert found.pieces.loop is None
        assert reason in found.pieces.no_loop
    assert ways[0].endswith(f"{N_LAYERS} calls of experts, run by Python: {found.pieces.no_loop}")


def test_a_driver_that_cannot_be_called_leaves_python(run: Callable[..., Run], expected: list[int]) -> None:
    ways: list[str] = []
    with fake_cards(1) as cards, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrimoe.runtime.exchanged.driver_of", real_driver_of)
        found = run(cards, prepare=lambda model: ways.append(model.hybrimoe.way.layers["model"]))
        assert found.tokens == expected
        assert found.pieces.loop is None
        assert isinstance(found.pieces.within, ExchangedExperts)
        kept = found.pieces.within._driver
        assert isinstance(kept, str), "an error would keep the caches of the conversation in which it came"
    assert "run by Python: only NVIDIA's driver is called by compiled code" in ways[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA card here")
@pytest.mark.parametrize("slots", [0, 5, 12])
def test_tokens_of_a_real_card_are_those_of_the_cpu(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """By costs that give each lane work; every step is one compiled call."""
    steps: list[Any] = []
    monkeypatch.setattr("hybrimoe.runtime.startup.startup.measure_profile", lambda *args: COSTS)
    directory, options = save_model(tmp_path / "model", "float32"), {"backend": "numba", "policy": "ours"}
    expected, _ = greedy(directory, byte_tokenizer, accelerator="none", **options)
    found, stats = greedy(
        directory, byte_tokenizer, lambda model: steps.append(model.hybrimoe.step), accelerator="auto",
        gpu_expert_slots=slots, **options,
    )  # fmt: skip
    assert found == expected
    (step,) = steps
    assert step.n_steps == step.n_looped == STEPS, step._captured[-1].no_loop
    decode = stats.by_phase["decode"]
    assert (decode.accel_experts > 0) == (slots > 0)


def test_prompts_that_stream_through_slots_and_tokens_by_the_loop_take_turns(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt: by the first, gates and kernels are known."""
    monkeypatch.setattr("hybrimoe.runtime.startup.startup.measure_profile", lambda *args: FAST_LINK)
    monkeypatch.setattr(StreamedKernels, "MAX_TOKENS", 1 << 20)
    prompts = [PROMPT, PROMPT[::-1], PROMPT[10:] + PROMPT[:10]]

    def replies(**options: Any) -> tuple[list[list[int]], Any]:
        model = hybrimoe.load(
            save_model(tmp_path / f"model {len(options)}", "float32"), progress=False, expert_dtype="float32",
            backend="numba", policy="ours", **options,
        )  # fmt: skip
        generator, found = TextGenerator(model, byte_tokenizer, prefill_chunk_tokens=40), []
        for prompt in prompts:
            reply = generator.reply(prompt, SamplingOptions(temperature=0.0, max_new_tokens=6))
            for _ in reply:
                pass
            found.append(reply.token_ids)
        staged = model.hybrimoe.session.staged()
        done = (0 if staged is None else staged.n_calls), getattr(model.hybrimoe.step, "n_looped", 0)
        model.hybrimoe.session.close()
        return found, done

    expected, (none, _) = replies(accelerator="none")
    assert none == 0
    with fake_cards(1) as cards:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        found, (n_calls, n_looped) = replies(accelerator=ONE, gpu_expert_slots=12)
    assert found == expected
    assert n_calls >= 2 * N_LAYERS
    assert n_looped >= 5


@pytest.mark.parametrize("looped", [True, False])
def test_the_cpu_computes_while_the_link_is_busy(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, looped: bool
) -> None:
    """Between a layer's copies and the piece behind it, when the CPU computes its share, no time goes by: nobody waits
    for the copies, which take long."""
    copied_us, met, launches = [0.0], [0], [False]
    transfer, replay, launch = Cards.transfer, CardGraph.replay, Lanes.launch

    def launched(lanes: Lanes, *args: Any) -> None:
        launches[0] = True
        launch(lanes, *args)
        launches[0] = False

    def copying(cards: Cards, stream: Any, what: str, n_bytes: int, *args: Any) -> int:
        answers = launches[0]
        if looped and Run.latest is not None and Run.latest.step._captured:
            answers = Run.latest.loop._token[at_place.STAGE] == at_place.ANSWERS
        if answers and Run.latest is not None and what == "copy to the card" and n_bytes > 10_000:
            copied_us[0] = cards.clock.now_us()
        return transfer(cards, stream, what, n_bytes, *args)

    def launching(graph: CardGraph) -> None:
        if copied_us[0]:
            assert graph._cards.clock.now_us() == copied_us[0]
            met[0] += 1
            copied_us[0] = 0.0
        replay(graph)

    monkeypatch.setattr(Cards, "transfer", copying)
    monkeypatch.setattr(Lanes, "launch", launched)
    monkeypatch.setattr(CardGraph, "replay", launching)
    if not looped:
        monkeypatch.setattr("hybrimoe.step.captured.CapturedStep._loop_over", lambda step, pieces: None)
    with fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS) as cards:
        found = run(cards, gpu_expert_slots=5)
    assert (found.pieces.loop is not None) == looped
    decode = found.stats.by_phase["decode"]
    assert met[0] > 0 < decode.cpu_experts

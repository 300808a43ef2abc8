"""Every place where the host waits for a device, before a card that hangs: it gives up, and says what it waited for.

Without its wait a place would ask the card for a result by a call of the driver, which never comes back, or go on with
what is not there; the fake card says so of the first, and the second ends without the error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels import ExpertSpec
from gpu_kernels import LostError, TorchAccelerator
from gpu_kernels.combining import combine_on_host
from gpu_kernels.fused_choice import FusedChoice, RowsOfCall
from gpu_kernels.waiting import limit_of, new_limit, on_device
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.sampling import Sampler
from hybrimoe.machine import calibrate, doctor_machine
from hybrimoe.runtime import Session
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.failures import failed_experts
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.reports import Reports
from hybrimoe.runtime.layer_call.routing import host_floats, host_index
from hybrimoe.runtime.layer_call.slots import CopiesUnderWay
from hybrimoe.runtime.resident import ResidentExperts
from hybrimoe.runtime.staged import StagedPrompts
from hybrimoe.runtime.startup import measure
from hybrimoe.runtime.token_loop.compiled import WAITS_LONG
from hybrimoe.runtime.token_loop.loop import TokenLoop
from hybrimoe.step.pieces import Pieces
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

CARD = torch.device(f"{DEVICE_TYPE}:0")
SPEC = ExpertSpec(8, 8, "float32")
N_BYTES = SPEC.record_bytes
EVENT, STREAM = "a copy or a computation", "all work of a stream"
Hangs = Callable[[], None]
"""From its call on, the card's current stream ends nothing."""
HANGS: list[Callable[[], None]] = []
"""All of them, for `test_every_wait`."""


@contextlib.contextmanager
def card_that_may_hang() -> Iterator[tuple[Cards, Hangs]]:
    """Waits for it are short from when it hangs."""
    with fake_cards(1) as cards:
        new_limit(CARD, "the card")

        def hang() -> None:
            limit_of(CARD).allow(0.05)
            cards.stream().hang()

        try:
            yield cards, hang
        finally:
            cards.findings.clear()
            new_limit(CARD, "a card that works")  # of the device's other users


def gives_up_on(what: str) -> Callable[[Callable[[Hangs], object]], Callable[[], None]]:
    """A scenario from what hangs a card and then comes to a wait: of that the error tells."""

    def scenario_of(comes_to_it: Callable[[Hangs], object]) -> Callable[[], None]:
        @functools.wraps(comes_to_it)
        def scenario() -> None:
            with card_that_may_hang() as (_, hang), pytest.raises(LostError, match=f"hangs: {what} did not end"):
                comes_to_it(hang)

        HANGS.append(scenario)
        return scenario

    return scenario_of


def scenario(played: Callable[[], None]) -> Callable[[], None]:
    """One that is not only about the error."""
    HANGS.append(played)
    return played


def accelerator_with_slots(n_slots: int = 2) -> TorchAccelerator:
    made = TorchAccelerator(str(CARD))
    made.allocate(n_slots, N_BYTES)
    return made


def record_of_host(*_: int) -> np.ndarray:
    """uint8, page-locked."""
    record = torch.empty(N_BYTES, dtype=torch.uint8, pin_memory=True)
    record.fill_(0)
    return record.numpy()


def under_way(hang: Hangs) -> Any:
    """The event of work that never ends, as the runtime keeps it."""
    accelerator = accelerator_with_slots()
    hang()
    return SimpleNamespace(event=accelerator.mark(), transfer=SimpleNamespace(layer=0, expert=0, slot=0))


# Reads of tensors -----------------------------------------------------------------------------------------------


@gives_up_on("the model's output")
def a_token_is_chosen(hang: Hangs) -> None:
    logits = torch.zeros(8, device=CARD)
    hang()
    Sampler.next(SimpleNamespace(_next=lambda given: given.argmax().item()), logits)  # type: ignore[arg-type]


@gives_up_on("the model's output")
def a_prompt_is_shared(hang: Hangs) -> None:
    cache: Any = SimpleNamespace(
        _checkpoints=[], _prefixes=SimpleNamespace(), n_read=0, needs_checkpoints=False, token_ids=[1],
        _share=lambda checkpoints, with_end: None,
    )  # fmt: skip
    logits = torch.zeros(8, device=CARD)
    hang()
    PrefixCache.share_prompt(cache, logits)


@gives_up_on("a layer's inputs")
def hidden_states_are_read(hang: Hangs) -> None:
    hidden = torch.zeros(1, 8, device=CARD)
    hang()
    host_floats(hidden)


@gives_up_on("a layer's routing")
def routing_is_read(hang: Hangs) -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64, device=CARD)
    hang()
    host_index(ids)


@gives_up_on("a layer's inputs")
def a_gate_is_looked_for(hang: Hangs) -> None:
    lookahead: Any = SimpleNamespace(_blocks=[[]], _experts=[None], _num_experts=[4])
    hidden = torch.zeros(1, 8, device=CARD)
    hang()
    Lookahead._linear_gate(lookahead, 0, hidden, np.zeros((1, 2), np.int64))


@gives_up_on("the work of a layer")
def an_output_goes_to_the_host(hang: Hangs) -> None:
    output = torch.zeros(1, 8, device=CARD)
    hang()
    ExpertsCall._as_asked(SimpleNamespace(), output, torch.zeros(1, 8))  # type: ignore[arg-type]


@gives_up_on("the work before")
def work_begins_with_a_copy(hang: Hangs) -> None:
    hang()
    with on_device(CARD):
        pass


@gives_up_on("a multiplication")
def a_device_is_examined(hang: Hangs) -> None:
    hang()
    doctor_machine._compute_a_little(CARD)


# Kernels that are tried out -------------------------------------------------------------------------------------


@gives_up_on("counters of kernels of one launch")
def counters_are_made(hang: Hangs) -> None:
    choice = FusedChoice(SimpleNamespace(new_state=lambda device: torch.zeros(1, device=device)))  # type: ignore[arg-type]
    hang()
    choice.take(SPEC, 1, SimpleNamespace(single=True), CARD)


@gives_up_on("the first run of a kernel")
def a_kernel_is_compared(hang: Hangs) -> None:
    choice: Any = FusedChoice(SimpleNamespace(block_tokens=lambda n_tokens: 1))  # type: ignore[arg-type]
    choice._try = lambda spec, slots, group: None
    group: Any = SimpleNamespace(n_tokens=[1], out=torch.ones(2, 8, device=CARD), own_rows=slice(0, 1))
    choice.run(SPEC, torch.zeros(1, device=CARD), group, by_torch=hang)


@gives_up_on("the first run of a kernel")
def a_sum_is_compared(hang: Hangs) -> None:
    rows = torch.ones(1, 8, device=CARD)
    choice = FusedChoice(SimpleNamespace(), lambda *given: rows)  # type: ignore[arg-type]

    def by_torch() -> torch.Tensor:
        hang()
        return rows

    choice.combine(RowsOfCall(rows, None, None, 1, torch.float32), by_torch)


# Slots ----------------------------------------------------------------------------------------------------------


@gives_up_on(STREAM)
def slots_are_replaced(hang: Hangs) -> None:
    accelerator = accelerator_with_slots()
    hang()
    accelerator.allocate(1, N_BYTES)


@gives_up_on(STREAM)
def all_is_waited_for(hang: Hangs) -> None:
    accelerator = accelerator_with_slots()
    hang()
    accelerator.synchronize()


@scenario
def other_streams_are_waited_for() -> None:
    """Torch's own, which nobody told the accelerator of: what one sends is there."""
    with fake_cards(1) as cards:
        accelerator = accelerator_with_slots()
        sent = torch.zeros(1 << 20, pin_memory=True)
        given = torch.ones(1 << 20, device=CARD)
        other = torch.Stream(CARD)
        other.wait_stream(cards.stream())
        with other:
            sent.copy_(given, non_blocking=True)
        accelerator.synchronize()
        assert float(sent[-1]) == 1.0
        cards.check()


@scenario
def slots_of_a_card_that_hangs_stay() -> None:
    """What hangs may still use them."""
    with card_that_may_hang() as (_, hang):
        accelerator = accelerator_with_slots()
        hang()
        accelerator.close()
        assert accelerator.n_slots == 2


# Copies and computations under way ------------------------------------------------------------------------------


@gives_up_on(EVENT)
def the_end_of_a_copy_is_told(hang: Hangs) -> None:
    item = under_way(hang)
    Reports._end_transfer(SimpleNamespace(_planner=None), item, "decode")  # type: ignore[arg-type]


@gives_up_on(EVENT)
def a_cache_waits_for_a_copy(hang: Hangs) -> None:
    queue: Any = SimpleNamespace(pending=[under_way(hang)])
    CopiesUnderWay([queue], SimpleNamespace()).wait_for_one()  # type: ignore[arg-type]


@gives_up_on(EVENT)
def rows_are_added_up_on_the_host(hang: Hangs) -> None:
    combine_on_host(measure._work(SPEC, 1, 1), [under_way(hang).event])


@gives_up_on(EVENT)
def resident_prompts_are_counted(hang: Hangs) -> None:
    ResidentExperts.report(SimpleNamespace(uncounted=[under_way(hang)]), SimpleNamespace())  # type: ignore[arg-type]


@gives_up_on(EVENT)
def streamed_prompts_are_counted(hang: Hangs) -> None:
    call = SimpleNamespace(ends=[under_way(hang).event])
    StagedPrompts.report(SimpleNamespace(untold=[call]), SimpleNamespace())  # type: ignore[arg-type]


@gives_up_on(EVENT)
def slots_are_lent(hang: Hangs) -> None:
    queue = SimpleNamespace(pending=[under_way(hang)])
    experts = SimpleNamespace(lanes=SimpleNamespace(queues=[queue]))
    planner = SimpleNamespace(slots=SimpleNamespace(n_slots=2, key_of=np.zeros(2, np.int64)), lend=lambda n: False)
    StagedPrompts._lent(
        SimpleNamespace(planner=planner, n_places=1, runner=SimpleNamespace(experts=experts, report=lambda: None))  # type: ignore[arg-type]
    )


@scenario
def the_work_that_failed_is_found() -> None:
    """The second piece of two is that of a card that hangs."""
    with card_that_may_hang() as (_, hang):
        ended = accelerator_with_slots().mark()
        ended.wait()
        demand = SimpleNamespace(expert_ids=np.array([4, 7]))
        space: Any = SimpleNamespace(sent=[[0], [1]], ends=[ended, under_way(hang).event], demand=demand)
        assert failed_experts(space) == [7]


@gives_up_on(STREAM)
def lanes_are_drained(hang: Hangs) -> None:
    experts = SimpleNamespace(lanes=SimpleNamespace(queues=[SimpleNamespace(accelerator=accelerator_with_slots())]))
    hang()
    ExpertsCall.drain(SimpleNamespace(settle=lambda: None, every=[experts], report=lambda: None))  # type: ignore[arg-type]


@gives_up_on(STREAM)
def a_session_recovers(hang: Hangs) -> None:
    session: Any = SimpleNamespace(_accelerators=[accelerator_with_slots()])
    hang()
    Session._recover(session, SimpleNamespace(release=lambda: None))  # type: ignore[arg-type]


# Measuring ------------------------------------------------------------------------------------------------------


class Computes:
    """An accelerator on which a group of experts never ends. full: or finds no memory."""

    def __init__(self, hang: Hangs, *, full: bool = False) -> None:
        self.device, self.own, self._hang, self._full = CARD, accelerator_with_slots(), hang, full

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def run_experts(self, *_: Any) -> Any:
        self._hang()
        if self._full:
            raise torch.OutOfMemoryError
        return self.own.mark()


STORE: Any = SimpleNamespace(layers=[SimpleNamespace(spec=SPEC, num_experts=2)], record=record_of_host)
POOL: Any = SimpleNamespace(spec=SPEC)


@gives_up_on(STREAM)
def no_memory_for_a_first_run(hang: Hangs) -> None:
    measure.run_each_kernel(STORE, [0], Computes(hang, full=True))  # type: ignore[arg-type]


@gives_up_on(EVENT)
def experts_are_timed_at_start(hang: Hangs) -> None:
    measure._accel_call(Computes(hang), SPEC)(measure._work(SPEC, 1, 1), 1)  # type: ignore[arg-type]


@gives_up_on(EVENT)
def experts_are_timed_by_calibrate(hang: Hangs) -> None:
    calibrate._accel_us(Computes(hang), POOL, measure._work(SPEC, 1, 1))  # type: ignore[arg-type]


def link_that_hangs(hang: Hangs, n_slots: int) -> TorchAccelerator:
    accelerator = accelerator_with_slots(n_slots)
    hang()
    assert accelerator._copy_stream is not None
    accelerator._copy_stream.wait_stream(torch.accelerator.current_stream(CARD))
    return accelerator


@gives_up_on(EVENT)
def the_link_is_timed_at_start(hang: Hangs) -> None:
    measure._measure_link(STORE, 0, link_that_hangs(hang, 2))


@gives_up_on(EVENT)
def the_link_is_timed_by_calibrate(hang: Hangs) -> None:
    records = [record_of_host() for _ in range(calibrate.N_EXPERTS)]
    pool: Any = SimpleNamespace(spec=SPEC, memory=records)
    calibrate._link_gbps(link_that_hangs(hang, calibrate.N_EXPERTS), pool)


# Decode steps ---------------------------------------------------------------------------------------------------


def sent_call(hang: Hangs) -> Any:
    exchange = accelerator_with_slots().exchange(1, 2, 8, torch.float32, torch.float32)
    hang()
    return SimpleNamespace(exchange=exchange)


@gives_up_on("a piece of a decode step")
def python_waits_for_a_piece(hang: Hangs) -> None:
    place: Any = SimpleNamespace(sent=sent_call(hang))
    answers: Any = SimpleNamespace(experts=lambda place: None)
    Pieces._answer(SimpleNamespace(busy_ns=0), place, answers)  # type: ignore[arg-type]


@gives_up_on("a piece of a decode step")
def compiled_code_has_waited_long(hang: Hangs) -> None:
    answers = iter([WAITS_LONG])
    loop: Any = SimpleNamespace(
        _run=lambda address: next(answers), _token=np.zeros(1, np.int64), at=0, calls=[sent_call(hang)]
    )
    TokenLoop._go_on(loop)

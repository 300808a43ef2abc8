"""The layers of a token between two graphs of a device, in compiled code that holds no lock of Python's.

Place by place (a call of experts that a recorded step has sent): the piece before it is launched; what the place before
has left to do is done while the device computes (`_settle`); the host waits for the piece, decides by the compiled
decision of `hybrimoe.runtime.layer_call.choosing`, starts copies and the experts in slots, and computes the CPU's
(`_answer`). Where anything unusual comes, the loop stops and says at which place, and Python goes on from there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpu_kernels.engine.routed import read_call, run_some
from cpu_kernels.engine.waiting import now_ns
from cpu_kernels.jit.atomics import pause
from cpu_kernels.jit.compiled import inline_kernel
from cpu_kernels.jit.primitives import bytes_at, halves_at, int32s_at, int64s_at
from cpu_kernels.jit.primitives import floats_at as singles_at
from gpu_kernels.driver.queue import COUNT as N_UNDER_WAY
from gpu_kernels.driver.queue import (
    END,
    FAILED,
    IS_TIMED,
    KEY,
    N_WORDS,
    SLOT,
    START,
    SUBMITTED_NS,
    await_slot,
    drop_oldest,
    entry_of,
    has_ended,
    has_room,
    launch,
    mark,
    oldest_has_begun,
    oldest_has_ended,
    submit_copy,
    took_us,
)
from hybrimoe.runtime.layer_call.choosing import ADDRESSES as ADDRESSES_OF_LAYER
from hybrimoe.runtime.layer_call.choosing import (
    COUNTS,
    DESK,
    EXPERT_IDS,
    HOST_HIDDEN,
    OFFSETS,
    PAIR_ROWS,
    POSITIONS,
    RECORDS,
    ROUTING,
    SLATE_SIZE,
    WIDTH,
    read_and_choose,
    settle_call,
)
from hybrimoe.runtime.layer_call.choosing import N_EXPERTS as N_OF_LAYER
from hybrimoe.runtime.layer_call.compiled import predict_token, without_gil
from hybrimoe.runtime.layer_call.tallies import (
    ACTIVATED,
    CALLS,
    CPU_EXPERTS,
    CPU_US,
    LINK_US,
    MISSES,
    N_TALLIES,
    OVERHEAD_US,
    TOKENS,
    WALL_US,
)
from scheduler.balancing.problem import ACCEL, COUNT, TRANSFER
from scheduler.planner.at_once import (
    DESK_SIZE,
    DRIFT,
    FETCHED,
    FETCHED_KEY,
    FETCHED_SLOT,
    HANDS_ON,
    N_EXPERTS,
    N_LAYERS,
    OPEN,
    ROWS,
    land_at_once,
)
from scheduler.planner.at_once import LINK_US as LINK_COSTS
from scheduler.planner.decide import SLOT as PLAN_SLOT
from scheduler.planner.movement import MAX_PREFETCHES
from scheduler.planner.open_plans import ENDED, end_plan, oldest_share
from scheduler.views import floats_at, ints_at

Ints = npt.NDArray[np.int64]

(QUEUE, PLACES, N_PLACES, AT, STAGE, OWES, DESK_AT, NOW, RUN, FIRST_ROW, TALLIES, N_ROWS, ADDRESSES, RECORD_BYTES,
 OBSERVING, N_MOVED, NUMBERS, GATES, N_ACTIVE, N_AWAITED, BAD, TOKEN_SIZE) = range(22)  # fmt: skip
"""Places of a token int64[TOKEN_SIZE]. AT, STAGE: where it goes on. OWES: whether the place before AT has left
something to do. DESK_AT: what decides; 0 where nothing has a slot. FIRST_ROW: of the counters of layer 0. ADDRESSES: of
each layer's records. OBSERVING: whether this token's times correct the costs. N_MOVED: transfers started. BAD: a slot,
or a token whose hidden state is not finite, as the answer says. N_ACTIVE, N_AWAITED: of the latest decision."""
HORIZON, LINK_FREE_NS, PIECES_NS, BUSY_NS, N_NUMBERS = range(5)
"""Places of NUMBERS float64[N_NUMBERS]. LINK_FREE_NS: when the copies under way will have ended. PIECES_NS: in which
the host was busy with pieces, or waited for one. BUSY_NS: for how long the loop waits before Python does."""
(GRAPH, EXPERTS, SLATE, IDS_AT, WEIGHTS_AT, WEIGHTS_KIND, TOP_K, HIDDEN_AT, HIDDEN_KIND, LAYER, LAUNCH_NS, SHEET,
 OUT_ROWS, SOURCE_AT, GIVEN, SCORES, N_GIVEN, IS_TOLD, TARGET, TARGET_IDS, TARGET_SCORES, N_TARGET, BEGAN, ENDED_AT,
 N_CPU, N_ACCEL, CPU_NS, SHARE, ANSWERED_NS, LANES_NS, SETTLED_NS, PLACE_SIZE) = range(32)  # fmt: skip
"""Places of a place int64[PLACE_SIZE]: graphs of the piece before it and of its experts; the `Slate`; where the call's
tensors lie (`Places`); LAUNCH_NS: until the device's first expert runs; SHEET, OUT_ROWS, SOURCE_AT: of the CPU's
experts, where their rows go, and where the device is told which are theirs; GIVEN, SCORES, N_GIVEN, IS_TOLD: what the
gates foretell for its decision, and whether they have; TARGET and the next: what it foretells for the place behind it
(N_TARGET 0: nothing). Of the latest token: events BEGAN and ENDED_AT around the device's experts, N_CPU, N_ACCEL
experts, CPU_NS for the former, the plan's link SHARE in millionths, what the answer took, its lanes of that, and what
came after it."""
HALVES, BIAS, CORRECTION, CORRECTED, SCORING, N_GATES, N_GATED, GATE_WIDTH, GATES_SIZE = range(9)
"""Places of GATES int64[GATES_SIZE]: a `GateStack`."""
LAUNCHES, OWING, WAITS, ANSWERS = range(4)
"""Stages of a place."""
DONE, IN_PYTHON, WAITS_LONG, HANDED_ON, NOT_FINITE, NOT_PINNED, REFUSED = range(7)
"""Answers of `run_token`. IN_PYTHON: the place's call is Python's, and nothing of it has happened. HANDED_ON: it is
Python's after the decision, which found HANDS_ON. REFUSED: the driver has, see FAILED."""
GOES_ON = -1
"""Of a stage: no answer yet."""
SHARE_UNIT = 1e6


@inline_kernel
def _place(token: Ints, number: int) -> Ints:
    return int64s_at(token[PLACES] + 8 * PLACE_SIZE * number, PLACE_SIZE)


@inline_kernel
def _queue(token: Ints) -> Ints:
    return int64s_at(token[QUEUE], N_WORDS)


@inline_kernel
def _launch(token: Ints, place: Ints) -> int:
    """The piece before a place, the last one behind all of them."""
    start_ns = now_ns()
    if not launch(_queue(token), place[GRAPH]):
        return REFUSED
    floats_at(token[NUMBERS], N_NUMBERS)[PIECES_NS] += now_ns() - start_ns
    token[STAGE] = OWING
    return GOES_ON


@inline_kernel
def _link_busy_ns(token: Ints, now: int) -> float:
    """Expected ns until the copies under way have ended, as `TransferQueue.busy_us`."""
    queue, desk = _queue(token), int64s_at(token[DESK_AT], DESK_SIZE)
    n_layers = desk[N_LAYERS]
    costs, drift = floats_at(desk[LINK_COSTS], n_layers), floats_at(desk[DRIFT], 3)
    total_us, n_experts = 0.0, desk[N_EXPERTS]
    for number in range(queue[N_UNDER_WAY]):
        total_us += costs[entry_of(queue, number)[KEY] // n_experts] * drift[TRANSFER]
    oldest = entry_of(queue, 0)
    since_ns = now - oldest[SUBMITTED_NS] if oldest[IS_TIMED] and oldest_has_begun(queue) else 0
    return max(total_us * 1e3 - since_ns, 0.0)


@inline_kernel
def _land(token: Ints) -> bool:
    """Copies that have ended: their experts are there, and their times correct the link's. False: REFUSED."""
    queue, desk = _queue(token), int64s_at(token[DESK_AT], DESK_SIZE)
    rows = floats_at(token[TALLIES], (token[N_ROWS], N_TALLIES))
    while oldest_has_ended(queue):
        entry = entry_of(queue, 0)
        us = took_us(queue, entry[START], entry[END]) if entry[IS_TIMED] else 0.0
        rows[token[FIRST_ROW] + entry[KEY] // desk[N_EXPERTS], LINK_US] += us
        land_at_once(token[DESK_AT], entry[SLOT], entry[KEY], us)
        drop_oldest(queue)
    return bool(queue[FAILED] == 0)


@inline_kernel
def _copy(token: Ints, key: int, slot: int) -> bool:
    """The record of an expert into a slot. False: REFUSED."""
    desk = int64s_at(token[DESK_AT], DESK_SIZE)
    n_experts, n_layers = desk[N_EXPERTS], desk[N_LAYERS]
    layer, expert = key // n_experts, key % n_experts
    source = int64s_at(int64s_at(token[ADDRESSES], n_layers)[layer], n_experts)[expert]
    n_bytes = int64s_at(token[RECORD_BYTES], n_layers)[layer]
    return submit_copy(_queue(token), key, slot, source, n_bytes, now_ns())


@inline_kernel
def _foretell(token: Ints, place: Ints) -> None:
    """What the gate of a later layer makes of this place's hidden state, for the decision of the next place."""
    gates, slate = int64s_at(token[GATES], GATES_SIZE), int64s_at(place[SLATE], SLATE_SIZE)
    n_layers, n_experts, width, n = gates[N_GATES], gates[N_GATED], gates[GATE_WIDTH], place[N_TARGET]
    flat = n_layers * n_experts
    predict_token(
        halves_at(gates[HALVES], flat * width).reshape(n_layers, n_experts, width),
        singles_at(gates[BIAS], flat).reshape(n_layers, n_experts),
        singles_at(gates[CORRECTION], flat).reshape(n_layers, n_experts),
        bytes_at(gates[CORRECTED], n_layers).view(np.bool_),
        int64s_at(gates[SCORING], n_layers), singles_at(slate[HOST_HIDDEN], width), place[TARGET],
        int32s_at(place[TARGET_IDS], n).reshape(1, n), singles_at(place[TARGET_SCORES], n).reshape(1, n),
    )  # fmt: skip
    _place(token, token[AT])[IS_TOLD] = 1


@inline_kernel
def _end_layer(token: Ints, place: Ints) -> int:
    """The plan of a place has run: its slots are let go of."""
    plans = int64s_at(token[DESK_AT], DESK_SIZE)[OPEN]
    if token[OBSERVING]:
        place[SHARE] = int(oldest_share(plans, place[LAYER]) * SHARE_UNIT)
    ended = end_plan(plans, place[LAYER])
    if ended != ENDED:
        token[BAD] = ended
        return NOT_PINNED
    return GOES_ON


@inline_kernel
def _learn(token: Ints, place: Ints) -> int:
    """Gates foretell, experts of later layers are fetched, what has ended is learnt from and counted, as
    `ExpertsCall.settle` does."""
    queue, numbers = _queue(token), floats_at(token[NUMBERS], N_NUMBERS)
    if place[N_TARGET]:
        _foretell(token, place)
    n_fetched = settle_call(place[SLATE], token[FIRST_ROW] + place[LAYER])
    token[N_MOVED] += n_fetched
    fetched = ints_at(int64s_at(token[DESK_AT], DESK_SIZE)[FETCHED], (3, MAX_PREFETCHES))
    for i in range(n_fetched):
        if not _copy(token, fetched[FETCHED_KEY, i], fetched[FETCHED_SLOT, i]):
            return REFUSED
    if not _land(token):
        return REFUSED
    answer = _end_layer(token, place)
    now = now_ns()
    numbers[LINK_FREE_NS] = now
    if queue[N_UNDER_WAY]:
        numbers[LINK_FREE_NS] += _link_busy_ns(token, now)
    return answer


@inline_kernel
def _settle(token: Ints, place: Ints) -> int:
    """What nobody waits for once a call is answered."""
    start_ns, answer = now_ns(), GOES_ON
    if token[DESK_AT] != 0:
        answer = _learn(token, place)
    row = floats_at(token[TALLIES], (token[N_ROWS], N_TALLIES))[token[FIRST_ROW] + place[LAYER]]
    place[SETTLED_NS] = now_ns() - start_ns
    took_ns = place[ANSWERED_NS] + place[SETTLED_NS]
    row[CPU_US] += place[CPU_NS] * 1e-3
    row[WALL_US] += took_ns * 1e-3
    row[OVERHEAD_US] += (took_ns - place[LANES_NS]) * 1e-3
    return answer


@inline_kernel
def _settle_before(token: Ints) -> int:
    """What the place before has left to do."""
    answer = GOES_ON
    if token[OWES]:
        token[OWES] = 0
        answer = _settle(token, _place(token, token[AT] - 1))
    if answer == GOES_ON and token[AT] == token[N_PLACES]:
        answer = DONE
    token[STAGE] = WAITS
    return answer


@inline_kernel
def _wait(token: Ints) -> int:
    """Until the device has done the piece."""
    queue, numbers, start_ns = _queue(token), floats_at(token[NUMBERS], N_NUMBERS), now_ns()
    while not has_ended(queue):
        if queue[FAILED] != 0:
            return REFUSED
        if now_ns() - start_ns > numbers[BUSY_NS]:
            return WAITS_LONG
        pause()
    numbers[PIECES_NS] += now_ns() - start_ns
    token[STAGE] = ANSWERS
    return GOES_ON


@inline_kernel
def _start_experts(token: Ints, place: Ints, n_active: int, n_arriving: int) -> bool:
    """A decision's transfers, and its experts in slots behind them and behind those under way. False: REFUSED."""
    queue, slate = _queue(token), int64s_at(place[SLATE], SLATE_SIZE)
    desk = int64s_at(slate[DESK], DESK_SIZE)
    plan, ids = ints_at(desk[ROWS], (5, n_active + 1)), int32s_at(slate[EXPERT_IDS], n_active)
    first_key = place[LAYER] * desk[N_EXPERTS]
    for i in range(plan[TRANSFER, COUNT]):
        position = plan[TRANSFER, i]
        if not _copy(token, first_key + ids[position], plan[PLAN_SLOT, position]):
            return False
    if n_arriving:
        for i in range(plan[ACCEL, COUNT]):
            if not await_slot(queue, plan[PLAN_SLOT, plan[ACCEL, i]]):
                return False
    if not token[OBSERVING]:
        return launch(queue, place[EXPERTS])
    return mark(queue, place[BEGAN]) and launch(queue, place[EXPERTS]) and mark(queue, place[ENDED_AT])


@inline_kernel
def _run_on_cpu(token: Ints, place: Ints, n_active: int, n_cpu: int) -> bool:
    """The decision's experts of the CPU, into rows that the device reads. False: NOT_FINITE, see BAD."""
    slate, top_k = int64s_at(place[SLATE], SLATE_SIZE), place[TOP_K]
    offsets = int32s_at(slate[OFFSETS], n_active + 1)
    token[BAD] = run_some(
        place[SHEET], int64s_at(slate[RECORDS], n_cpu).view(np.uint64), int32s_at(slate[POSITIONS], n_cpu), offsets,
        int32s_at(slate[PAIR_ROWS], offsets[n_active]), singles_at(slate[ROUTING], top_k),
        singles_at(slate[HOST_HIDDEN], slate[WIDTH]).reshape(1, slate[WIDTH]),
        singles_at(place[OUT_ROWS], top_k * slate[WIDTH]).reshape(top_k, slate[WIDTH]),
    )  # fmt: skip
    return bool(token[BAD] < 0)


@inline_kernel
def _answer_alone(token: Ints, place: Ints) -> int:
    """A call of experts of which none has a slot: the CPU computes all."""
    start_ns, top_k = now_ns(), place[TOP_K]
    slate = int64s_at(place[SLATE], SLATE_SIZE)
    n_experts = slate[N_OF_LAYER]
    ids, offsets, rows = int32s_at(slate[EXPERT_IDS], top_k), int32s_at(slate[OFFSETS], top_k + 1), slate[PAIR_ROWS]
    n_active = read_call(
        place[IDS_AT], place[WEIGHTS_AT], place[WEIGHTS_KIND], int(np.int64(1)), top_k, place[HIDDEN_AT],
        place[HIDDEN_KIND], singles_at(slate[HOST_HIDDEN], slate[WIDTH]), singles_at(slate[ROUTING], top_k),
        int32s_at(slate[COUNTS], n_experts), ids, offsets, int32s_at(rows, top_k),
    )  # fmt: skip
    if n_active <= 0:
        return IN_PYTHON
    positions, records = int32s_at(slate[POSITIONS], n_active), int64s_at(slate[RECORDS], n_active)
    addresses, source = int64s_at(slate[ADDRESSES_OF_LAYER], n_experts), int32s_at(place[SOURCE_AT], top_k)
    for i in range(n_active):
        positions[i], records[i] = i, addresses[ids[i]]
    source[:] = top_k
    present = int32s_at(rows, offsets[n_active])
    for i in range(present.size):
        source[present[i]] = present[i]
    cpu_ns = now_ns()
    if not _run_on_cpu(token, place, n_active, n_active):
        return NOT_FINITE
    end_ns = now_ns()
    row = floats_at(token[TALLIES], (token[N_ROWS], N_TALLIES))[token[FIRST_ROW] + place[LAYER]]
    row[CALLS] += 1.0
    row[TOKENS] += 1.0
    row[ACTIVATED] += n_active
    row[MISSES] += n_active
    row[CPU_EXPERTS] += n_active
    place[CPU_NS] = place[LANES_NS] = end_ns - cpu_ns
    place[ANSWERED_NS] = end_ns - start_ns
    return GOES_ON


@inline_kernel
def _answer_with_slots(token: Ints, place: Ints) -> int:
    """The call of experts: decided, its copies and the device's experts started, the CPU's computed."""
    start_ns, queue, numbers = now_ns(), _queue(token), floats_at(token[NUMBERS], N_NUMBERS)
    if not has_room(queue, place[TOP_K] + MAX_PREFETCHES):
        return IN_PYTHON
    link_us = max(numbers[LINK_FREE_NS] - start_ns, 0.0) * 1e-3
    n_given = place[N_GIVEN] if place[IS_TOLD] else 0
    place[IS_TOLD] = 0
    n_active, n_awaited, n_cpu, n_accel, n_moved, _, _ = read_and_choose(
        place[SLATE], place[IDS_AT], place[WEIGHTS_AT], place[WEIGHTS_KIND], 1, place[TOP_K], place[HIDDEN_AT],
        place[HIDDEN_KIND], place[GIVEN], place[SCORES], n_given, token[NOW], token[RUN], numbers[HORIZON],
        token[FIRST_ROW] + place[LAYER], 0.0, place[LAUNCH_NS] * 1e-3, link_us,
    )  # fmt: skip
    if n_active <= 0:
        return IN_PYTHON
    token[N_ACTIVE], token[N_AWAITED] = n_active, n_awaited
    if n_awaited == HANDS_ON:
        return HANDED_ON
    token[N_MOVED] += n_moved
    place[N_CPU], place[N_ACCEL] = n_cpu, n_accel
    lanes_ns = now_ns()
    if n_accel and not _start_experts(token, place, n_active, n_moved + n_awaited):
        return REFUSED
    cpu_ns = now_ns()
    if n_cpu and not _run_on_cpu(token, place, n_active, n_cpu):
        return NOT_FINITE
    end_ns = now_ns()
    place[CPU_NS], place[LANES_NS] = end_ns - cpu_ns, end_ns - lanes_ns
    place[ANSWERED_NS] = end_ns - start_ns
    return GOES_ON


@inline_kernel
def _answer(token: Ints, place: Ints) -> int:
    """The call of experts."""
    answer = _answer_alone(token, place) if token[DESK_AT] == 0 else _answer_with_slots(token, place)
    if answer == GOES_ON:
        token[AT], token[STAGE], token[OWES] = token[AT] + 1, LAUNCHES, 1
    return answer


@without_gil
def run_token(address: int) -> int:
    """Goes on with a token at its place and stage, until it is done or Python is asked."""
    token = int64s_at(address, TOKEN_SIZE)
    answer = GOES_ON
    while answer == GOES_ON:
        place, stage = _place(token, token[AT]), token[STAGE]
        if stage == LAUNCHES:
            answer = _launch(token, place)
        elif stage == OWING:
            answer = _settle_before(token)
        elif stage == WAITS:
            answer = _wait(token)
        else:
            answer = _answer(token, place)
    return answer

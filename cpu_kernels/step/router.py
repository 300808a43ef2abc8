"""From router logits to the tables of the experts call: which experts, whose rows, with which weights.

One task does a step's whole selection; it takes a few microseconds. Ties go to the lower expert.
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.engine import call as engine
from cpu_kernels.jit.compiled import Real, Whole, Worker, float_kernel, inline_kernel
from cpu_kernels.jit.primitives import floats_at, int32s_at, int64s_at, take_ticket
from cpu_kernels.step.floats import bits_of, copy, float_of
from cpu_kernels.step.program import N_ROWS, STATE_SIZE, Part, Program

(STATE, NEXT, LOGITS, N_EXPERTS, TOP_K, SCORING, CORRECTION, N_GROUPS, TOP_GROUPS, BEST_OF_GROUP, WEIGHING,
 SCALE, JITTER, SCORES, CHOICE, ROOM, IDS, WEIGHTS, ADDRESSES, EXPERTS_CALL, COUNTS, ACTIVE, BY_ENTRY,
 EXPERT_SCALES, N_REAL, ROUTER_CALL) = range(26)  # fmt: skip
SOFTMAX, SIGMOID = range(2)
"""What a score is, from the logits."""
AS_SCORED, SUM_TO_ONE, SOFTMAX_OF_CHOSEN, SIGMOID_OF_CHOSEN = range(4)
"""What a chosen expert's weight is: its score; its share of the chosen scores; of the chosen ones' logits."""
REJECTED = -3.0e38


@dataclass(frozen=True, slots=True)
class Selection:
    """How a router chooses `top_k` experts and weighs them.

    correction float32 [experts] is added to scores for the choice only. n_groups: only experts of the `top_groups` best
    groups are chosen; a group's value is the sum of its `best_of_group` best.
    scale: of the weights; expert_scales float32 [experts]: of the weight of each. jitter: Phi's sparse mixer, in which
    a weight is a softmax over the scores near the chosen one (0: none).
    """

    top_k: int
    scoring: int = SOFTMAX
    weighing: int = AS_SCORED
    correction: np.ndarray | None = None
    n_groups: int = 1
    top_groups: int = 1
    best_of_group: int = 2
    scale: float = 1.0
    jitter: float = 0.0
    expert_scales: np.ndarray | None = None


def _select(call_address: int, thread: int) -> None:
    """Worker. Task (only one): all rows."""
    call = int64s_at(call_address, ROUTER_CALL)
    if take_ticket(call[NEXT]) > 0:
        return
    n_rows = int64s_at(call[STATE], STATE_SIZE)[N_ROWS]
    n_experts, top_k = call[N_EXPERTS], call[TOP_K]
    scores, choice = floats_at(call[SCORES], n_experts), floats_at(call[CHOICE], n_experts)
    for row in range(n_rows):
        logits = floats_at(call[LOGITS] + 4 * row * n_experts, n_experts)
        ids = int32s_at(call[IDS] + 4 * row * top_k, top_k)
        weights = floats_at(call[WEIGHTS] + 4 * row * top_k, top_k)
        if call[JITTER]:
            _mix_sparsely(logits, float_of(call[JITTER]), scores, ids, weights)
        else:
            _choose(call, logits, scores, choice, ids, weights)
        if call[EXPERT_SCALES]:
            scales = floats_at(call[EXPERT_SCALES], n_experts)
            for k in range(top_k):
                weights[k] *= scales[ids[k]]
    _fill_tables(call, n_rows)


@inline_kernel
def _choose(
    call: np.ndarray, logits: np.ndarray, scores: np.ndarray, choice: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> None:
    _score(call[SCORING], logits, scores)
    copy(scores, choice)
    if call[CORRECTION]:
        correction = floats_at(call[CORRECTION], scores.size)
        for i in range(scores.size):
            choice[i] += correction[i]
    if call[N_GROUPS] > 1:
        room = floats_at(call[ROOM], scores.size + call[N_GROUPS])
        _keep_best_groups(choice, room, call[N_GROUPS], call[TOP_GROUPS], call[BEST_OF_GROUP])
    for k in range(ids.size):
        ids[k] = _take_best(choice)
        weights[k] = scores[ids[k]]
    _weigh(call, logits, ids, weights)


@float_kernel
def _score(scoring: Whole, logits: np.ndarray, scores: np.ndarray) -> None:
    if scoring == SOFTMAX:
        top = logits[0]
        for i in range(1, logits.size):
            top = max(top, logits[i])
        total = np.float32(0)
        for i in range(logits.size):
            scores[i] = np.exp(logits[i] - top)
            total += scores[i]
        for i in range(logits.size):
            scores[i] /= total
    else:
        for i in range(logits.size):
            scores[i] = np.float32(1) / (np.float32(1) + np.exp(-logits[i]))


@inline_kernel
def _take_best(choice: np.ndarray) -> Whole:
    """The place of the largest value, which is then no more to be taken."""
    best = 0
    for i in range(1, choice.size):
        if choice[i] > choice[best]:
            best = i
    choice[best] = -np.inf
    return best


@inline_kernel
def _keep_best_groups(
    choice: np.ndarray, room: np.ndarray, n_groups: Whole, top_groups: Whole, best_of_group: Whole
) -> None:
    """Experts outside the best groups are not to be taken. room float32 [experts + n_groups] is overwritten."""
    size = choice.size // n_groups
    copy(choice, room[: choice.size])
    values = room[choice.size :]
    for group in range(n_groups):
        total = np.float32(0)
        for _ in range(min(best_of_group, size)):
            best = group * size
            for i in range(group * size, (group + 1) * size):
                if room[i] > room[best]:
                    best = i
            total += room[best]
            room[best] = -np.inf
        values[group] = total
    for _ in range(top_groups):
        best = 0
        for group in range(1, n_groups):
            if values[group] > values[best]:
                best = group
        values[best] = -np.inf
    for group in range(n_groups):
        if values[group] != -np.inf:
            for i in range(group * size, (group + 1) * size):
                choice[i] = -np.inf


@inline_kernel
def _weigh(call: np.ndarray, logits: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
    weighing = call[WEIGHING]
    if weighing == SOFTMAX_OF_CHOSEN:
        top = logits[ids[0]]
        for k in range(ids.size):
            top = max(top, logits[ids[k]])
        for k in range(ids.size):
            weights[k] = np.exp(logits[ids[k]] - top)
    elif weighing == SIGMOID_OF_CHOSEN:
        for k in range(ids.size):
            weights[k] = np.float32(1) / (np.float32(1) + np.exp(-logits[ids[k]]))
    factor = float_of(call[SCALE])
    if weighing in (SUM_TO_ONE, SOFTMAX_OF_CHOSEN):
        total = np.float32(0)
        for k in range(ids.size):
            total += weights[k]
        factor /= total
    for k in range(ids.size):
        weights[k] *= factor


@inline_kernel
def _mix_sparsely(logits: np.ndarray, jitter: Real, masked: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
    """Phi's sparse mixer without training noise: each further expert is chosen with those before it left out."""
    copy(logits, masked)
    for k in range(ids.size):
        best = 0
        for i in range(1, masked.size):
            if masked[i] > masked[best]:
                best = i
        top, total = masked[best], np.float32(0)
        for i in range(masked.size):
            near = (top - logits[i]) / max(abs(logits[i]), top) <= np.float32(2) * jitter
            if near and masked[i] > np.float32(REJECTED):
                total += np.exp(masked[i] - top)
        ids[k], weights[k] = best, np.float32(1) / total
        masked[best] = -np.inf


@inline_kernel
def _fill_tables(call: np.ndarray, n_rows: Whole) -> None:
    """The experts call: its active experts in ascending order, and the rows of each."""
    experts = int64s_at(call[EXPERTS_CALL], engine.CALL_SIZE)
    n_entries = n_rows * call[TOP_K]
    ids = int32s_at(call[IDS], n_entries)
    counts = int32s_at(call[COUNTS], call[N_EXPERTS])
    addresses = int64s_at(call[ADDRESSES], call[N_REAL])
    records, starts = int64s_at(experts[engine.RECORDS], n_entries), int64s_at(experts[engine.STARTS], n_entries + 1)
    tokens, flat = int32s_at(experts[engine.TOKENS], n_entries), int32s_at(experts[engine.FLAT], n_entries)
    for expert in range(counts.size):
        counts[expert] = 0
    for entry in range(n_entries):
        counts[ids[entry]] += 1
    n_active, n = 0, 0
    for expert in range(addresses.size):
        if counts[expert] > 0:
            records[n_active], starts[n_active] = addresses[expert], n
            n += counts[expert]
            counts[expert] = starts[n_active]
            n_active += 1
    starts[n_active] = n
    for entry in range(n_entries):
        if ids[entry] >= addresses.size:
            continue
        place = counts[ids[entry]]
        flat[place], tokens[place] = entry, entry if call[BY_ENTRY] else entry // call[TOP_K]
        counts[ids[entry]] += 1
    experts[engine.N_EXPERTS], experts[engine.N_ROWS] = n_active, n
    active = int64s_at(call[ACTIVE], 1)
    active[0] += n_active


SELECT_WORK = Worker(_select)


def add_selection(
    program: Program, selection: Selection, n_experts: int, logits: int, experts: np.ndarray, addresses: np.ndarray,
    ids: int, weights: int, *, meets: bool, by_entry: bool = False,
) -> np.ndarray:  # fmt: skip
    """Adds the choice of experts from float32 [rows, experts] at `logits`; returns int64 [1], the experts activated so
    far in all runs.

    experts: the call vector of the experts, whose tables are filled. addresses int64: of the records of the first of
    n_experts; the others have none and stand in no table. ids, weights: where int32 and float32 [rows, top_k] go.
    by_entry: the experts read a row for each of these, not for each token.
    """
    call = program.zeros(ROUTER_CALL, np.int64)
    active = program.zeros(1, np.int64)
    call[[STATE, LOGITS, N_EXPERTS, TOP_K]] = program.state.ctypes.data, logits, n_experts, selection.top_k
    call[[SCORING, WEIGHING]] = selection.scoring, selection.weighing
    if selection.correction is not None:
        call[CORRECTION] = program.keep(np.ascontiguousarray(selection.correction, np.float32))
    if selection.expert_scales is not None:
        call[EXPERT_SCALES] = program.keep(np.ascontiguousarray(selection.expert_scales, np.float32))
    call[[N_GROUPS, TOP_GROUPS]] = selection.n_groups, selection.top_groups
    call[BEST_OF_GROUP] = selection.best_of_group
    call[[SCALE, JITTER]] = bits_of(selection.scale), bits_of(selection.jitter) if selection.jitter else 0
    call[[SCORES, CHOICE]] = program.floats("scores", n_experts), program.floats("choice", n_experts)
    call[ROOM] = program.floats("groups", n_experts + selection.n_groups)
    call[[IDS, WEIGHTS, EXPERTS_CALL]] = ids, weights, experts.ctypes.data
    call[N_REAL] = len(addresses)
    call[[ADDRESSES, COUNTS]] = program.keep(addresses), program.floats("counts", n_experts)
    call[[ACTIVE, BY_ENTRY]] = active.ctypes.data, by_entry
    program.count(call, NEXT)
    program.add(SELECT_WORK, call, Part.ROUTER, meets=meets)
    return active

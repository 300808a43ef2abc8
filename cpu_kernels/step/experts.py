"""The experts of a layer inside a step: the workers of `cpu_kernels.engine`, on tables that the router fills.

Usually an expert's output is multiplied with its weight. Where its input is (Llama-4), each token has a row of its own
for each of its experts.
"""

import numpy as np

from cpu_kernels.engine import call as engine
from cpu_kernels.engine.plans import expert_plan
from cpu_kernels.engine.workers import DOWN_WORK, UP_WORK
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.jit.compiled import Worker
from cpu_kernels.jit.primitives import call_prepare, floats_at, int32s_at, int64s_at, take_ticket
from cpu_kernels.step.program import N_ROWS, STATE_SIZE, Part, Program
from cpu_kernels.step.stream import Target

STATE, NEXT, WIDTH, TOP_K, ROWS, WEIGHTS, SCALED, PREPARE, PLACE, ROW_BYTES, SCALED_CALL = range(11)
# The identity: the same first positions, then the number of experts that have weights, and where ids and results lie.
N_REAL, IDS, OUT, IDENTITY_CALL = range(WEIGHTS + 1, WEIGHTS + 5)


def experts_call(
    program: Program, spec: ExpertSpec, top_k: int, source: Target, weights: int, out: int, isa_name: str
) -> np.ndarray:
    """The call vector of experts that read rows at `source` and write float32 [rows * top_k, hidden] at `out`.

    weights: where float32 [rows, top_k] lie; 0: all are 1. Its tables are the program's own: one layer is computed at a
    time.
    """
    plan = expert_plan(spec, isa_name)
    call = program.zeros(engine.CALL_SIZE, np.int64)
    call[: engine.PLAN_SIZE] = plan.vector
    call[[engine.N_THREADS, engine.PARAMETERS]] = program.n_threads, program.keep(plan.parameters)
    call[engine.RECORDS] = program.floats("records", 2 * top_k)
    call[engine.STARTS] = program.floats("starts", 2 * top_k + 2)
    call[engine.TOKENS], call[engine.FLAT] = program.floats("tokens", top_k), program.floats("flat", top_k)
    call[[engine.X, engine.WEIGHTS, engine.OUT_ROWS]] = source.address, weights, out
    call[engine.H] = program.buffer(f"expert intermediate {top_k}", top_k * plan.h_row_bytes)
    call[[engine.X_PANEL, engine.H_PANEL]] = call[engine.PANEL]
    program.count(call, engine.COUNTERS, engine.N_COUNTERS)
    return call


def add_experts(program: Program, call: np.ndarray) -> None:
    """Adds both halves of the experts."""
    program.add(UP_WORK, call, Part.EXPERTS)
    program.add(DOWN_WORK, call, Part.EXPERTS)


def _scale_inputs(call_address: int, thread: int) -> None:
    """Worker. Task: a row of a token for one of its experts."""
    call = int64s_at(call_address, SCALED_CALL)
    n_rows, width, top_k = int64s_at(call[STATE], STATE_SIZE)[N_ROWS], call[WIDTH], call[TOP_K]
    while True:
        entry = take_ticket(call[NEXT])
        if entry >= n_rows * top_k:
            return
        values, weight = (
            floats_at(call[ROWS] + 4 * (entry // top_k) * width, width),
            floats_at(call[WEIGHTS], entry + 1),
        )
        scaled = floats_at(call[SCALED] + 4 * entry * width, width)
        for i in range(width):
            scaled[i] = values[i] * weight[entry]
        call_prepare(call[PREPARE], scaled.ctypes.data, width, call[PLACE] + entry * call[ROW_BYTES])


SCALED_WORK = Worker(_scale_inputs)


def add_scaled_inputs(program: Program, width: int, top_k: int, rows: int, weights: int, target: Target) -> None:
    """Adds what writes each of rows float32 [rows, width] times each of its weights float32 [rows, top_k] as the
    experts read it: [rows * top_k] rows at `target`."""
    call = program.zeros(SCALED_CALL, np.int64)
    call[[STATE, WIDTH, TOP_K, ROWS, WEIGHTS]] = program.state.ctypes.data, width, top_k, rows, weights
    call[SCALED] = program.floats("scaled inputs", top_k * width)
    call[[PREPARE, PLACE, ROW_BYTES]] = target.prepare, target.address, target.row_bytes
    program.count(call, NEXT)
    program.add(SCALED_WORK, call, Part.EXPERTS)


def _pass_identity(call_address: int, thread: int) -> None:
    """Worker. Task: a row of a token for one of its experts, where that is the identity."""
    call = int64s_at(call_address, IDENTITY_CALL)
    n_rows, width, top_k = int64s_at(call[STATE], STATE_SIZE)[N_ROWS], call[WIDTH], call[TOP_K]
    while True:
        entry = take_ticket(call[NEXT])
        if entry >= n_rows * top_k:
            return
        if int32s_at(call[IDS], entry + 1)[entry] >= call[N_REAL]:
            weight = floats_at(call[WEIGHTS], entry + 1)[entry]
            values = floats_at(call[ROWS] + 4 * (entry // top_k) * width, width)
            out = floats_at(call[OUT] + 4 * entry * width, width)
            for i in range(width):
                out[i] = values[i] * weight


IDENTITY_WORK = Worker(_pass_identity)


def add_identities(
    program: Program, width: int, n_real: int, top_k: int, rows: int, ids: int, weights: int, out: int
) -> None:  # fmt: skip
    """Adds the results of experts that give what they are given: for ids int32 [rows, top_k] from `n_real` on, float32
    [rows, width] at `rows` times weights float32 [rows, top_k] go to [rows, top_k, width] at `out`."""
    call = program.zeros(IDENTITY_CALL, np.int64)
    call[[STATE, WIDTH, TOP_K, ROWS, WEIGHTS]] = program.state.ctypes.data, width, top_k, rows, weights
    call[[N_REAL, IDS, OUT]] = n_real, ids, out
    program.count(call, NEXT)
    program.add(IDENTITY_WORK, call, Part.EXPERTS)

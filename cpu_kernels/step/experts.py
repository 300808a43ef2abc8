"""The experts of a layer inside a step: the workers of `cpu_kernels.engine`, on tables that the router fills."""

import numpy as np

from cpu_kernels.engine import call as engine
from cpu_kernels.engine.plans import expert_plan
from cpu_kernels.engine.workers import DOWN_WORK, UP_WORK
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.step.program import Part, Program
from cpu_kernels.step.stream import Target


def experts_call(
    program: Program, spec: ExpertSpec, top_k: int, source: Target, weights: int, out: int, isa_name: str
) -> np.ndarray:
    """The call vector of experts that read rows at `source` and write float32 [rows * top_k, hidden] at `out`.

    weights: where float32 [rows, top_k] lie. Its tables are the program's own: one layer is computed at a time.
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


def add_experts(program: Program, call: np.ndarray) -> int:
    """Adds the first half of the experts; returns its number. `add_experts_down` adds the second."""
    return program.add(UP_WORK, call, Part.EXPERTS)


def add_experts_down(program: Program, call: np.ndarray) -> int:
    """Adds the second half; returns its number."""
    return program.add(DOWN_WORK, call, Part.EXPERTS)

"""The `numba` backend: the SIMD kernels of this package."""

import threading
from dataclasses import dataclass

import numba
import numpy as np

from cpu_kernels import layer
from cpu_kernels.backends.base import check_run, raise_not_finite
from cpu_kernels.dispatch import Dispatch
from cpu_kernels.elementwise import ACT_MAX, ALPHA, GATE_MAX, UP_LIMIT, UP_OFFSET
from cpu_kernels.errors import BackendError
from cpu_kernels.isa import IsaChoice, detect
from cpu_kernels.layout import BLOCK_COLUMNS, block_bytes, is_quantised
from cpu_kernels.quantise import OFFSET
from cpu_kernels.simd.compile import panel_address
from cpu_kernels.simd.tiles import x_block_bytes
from cpu_kernels.spec import KINDS, Activation, ExpertSpec
from cpu_kernels.threads import resolve_threads, start_pool

# Columns / 64 of a weight panel that stays in L1 while many tokens pass over it.
SPLIT_BLOCKS = {"int4": 8, "int8": 4, "bfloat16": 4, "float32": 2}
SERIAL_BYTES = 128 * 1024  # below this much weight a second thread costs more than it saves


@dataclass(frozen=True, slots=True)
class _Plan:
    """A spec as the compiled driver reads it."""

    plan: np.ndarray  # int64 [layer.PLAN_SIZE]
    parameters: np.ndarray  # float32
    x_row_bytes: int
    h_row_bytes: int


class NumbaBackend:
    """SIMD kernels by ISA on Numba's thread pool; one call per layer. Safe to share between threads (calls queue)."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        self.choice: IsaChoice = detect()
        self.n_threads = resolve_threads(threads)
        self.threading_layer = start_pool(self.n_threads)
        self._plans: dict[ExpertSpec, _Plan] = {}
        self._workspace = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def supports(self, spec: ExpertSpec) -> str | None:
        """None, or why `spec` does not run here."""
        if spec.activation.kind == "custom":
            return "a custom activation is Python code; the torch backend runs it"
        return None

    def run(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """See `CpuBackend.run`."""
        check_run(spec, records, positions, dispatch, hidden, out_rows)
        if not positions.size:
            return
        plan = self._plans.get(spec) or self._plan(spec)
        n_threads = 1 if spec.record_bytes * positions.size < SERIAL_BYTES else self.n_threads
        with self._lock:
            workspace = self._room(
                layer.workspace_bytes(
                    positions.size, dispatch.n_tokens, dispatch.rows.size, plan.x_row_bytes, plan.h_row_bytes
                )
            )
            if n_threads > 1:
                numba.set_num_threads(n_threads)
            bad = layer.run_layer(
                plan.plan,
                plan.parameters,
                records,
                positions,
                dispatch.offsets,
                dispatch.rows,
                dispatch.weights,
                dispatch.top_k,
                hidden,
                out_rows,
                workspace,
                n_threads,
            )
        if bad >= 0:
            raise_not_finite(bad)

    def _room(self, n_bytes: int) -> np.ndarray:
        """A workspace of at least n_bytes, kept between calls."""
        if self._workspace.size < n_bytes:
            self._workspace = np.empty(n_bytes * 5 // 4, np.uint8)
        return self._workspace

    def _plan(self, spec: ExpertSpec) -> _Plan:
        reason = self.supports(spec)
        if reason is not None:
            raise BackendError(f"backend 'numba' cannot run these experts: {reason}")
        layout, x_bytes = spec.layout, x_block_bytes(spec.dtype)
        plan = np.zeros(layer.PLAN_SIZE, np.int64)
        plan[layer.PANEL] = panel_address(spec.dtype, self.choice.isa.name)
        plan[layer.HIDDEN_TRUE], plan[layer.INTER_TRUE] = spec.hidden, spec.inter
        plan[layer.HIDDEN], plan[layer.INTER] = layout.hidden_padded, layout.inter_padded
        plan[layer.BLOCK_BYTES], plan[layer.X_BYTES] = block_bytes(spec.dtype), x_bytes
        plan[layer.CODE_OFFSET] = OFFSET[spec.dtype] if is_quantised(spec.dtype) else 0
        plan[layer.GATED], plan[layer.KIND] = spec.activation.gated, KINDS.index(spec.activation.kind)
        plan[layer.DOWN], plan[layer.HAS_BIAS] = layout.down_offset, spec.has_bias
        plan[layer.GATE_BIAS], plan[layer.UP_BIAS] = layout.gate_bias_offset, layout.up_bias_offset
        plan[layer.DOWN_BIAS], plan[layer.SPLIT_BLOCKS] = layout.down_bias_offset, SPLIT_BLOCKS[spec.dtype]
        plan[layer.PREPARE_WORKER], plan[layer.UP_WORKER] = layer.PREPARE.address, layer.UP.address
        plan[layer.DOWN_WORKER] = layer.DOWN_PROJECTION.address
        made = _Plan(
            plan,
            _parameters(spec.activation),
            layout.hidden_padded // BLOCK_COLUMNS * x_bytes,
            layout.inter_padded // BLOCK_COLUMNS * x_bytes,
        )
        self._plans[spec] = made
        return made


def _parameters(activation: Activation) -> np.ndarray:
    values = np.zeros(5, np.float32)
    values[ALPHA] = activation.alpha
    values[GATE_MAX] = np.inf if activation.gate_max is None else activation.gate_max
    values[ACT_MAX] = np.inf if activation.act_max is None else activation.act_max
    values[UP_LIMIT] = np.inf if activation.up_limit is None else activation.up_limit
    values[UP_OFFSET] = activation.up_offset
    return values

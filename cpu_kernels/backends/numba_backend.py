"""The `numba` backend: the SIMD kernels of this package."""

import threading

import numpy as np
import torch

from cpu_kernels.backends.base import check_run, raise_not_finite
from cpu_kernels.engine import layer, routed
from cpu_kernels.engine.attention_workers import attention_bytes, run_attention
from cpu_kernels.engine.dispatch import Dispatch
from cpu_kernels.engine.outputs import Outputs
from cpu_kernels.engine.plans import Plan, expert_plan, linear_plan
from cpu_kernels.engine.team import helpers, start_team
from cpu_kernels.errors import BackendError
from cpu_kernels.format.linear import LinearSpec, check_linear
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.host.isa import IsaChoice, detect
from cpu_kernels.host.threads import resolve_threads

SERIAL_BYTES = 128 * 1024  # below this much weight a second thread costs more than it saves
SERIAL_CONTEXT_BYTES = 1024 * 1024  # the same for keys and values, most of which the last step left in a cache


class Sheet:
    """What is the same in all whole calls of a layer of one shape, at an `address`; see `cpu_kernels.engine.routed`.

    It keeps what it was made of, so that the ids by which it is known stay theirs. needed: bytes of workspace.
    """

    __slots__ = ("_made_of", "address", "needed", "words", "workspace")

    def __init__(self, spec: ExpertSpec, plan: Plan, records: np.ndarray, needed: int) -> None:
        self._made_of, self.needed = (spec, plan, records), needed
        self.words = np.zeros(routed.SHEET_SIZE, np.int64)
        self.address = self.words.ctypes.data
        self.workspace: np.ndarray | None = None
        self.words[[routed.PLAN, routed.PARAMETERS]] = plan.vector.ctypes.data, plan.parameters.ctypes.data
        self.words[[routed.RECORDS, routed.N_RECORDS]] = records.ctypes.data, records.size
        self.words[[routed.N_PARAMETERS, routed.WIDTH]] = plan.parameters.size, spec.hidden

    def work_in(self, workspace: np.ndarray) -> None:
        """Calls use this memory from here on."""
        self.workspace = workspace
        self.words[[routed.WORKSPACE, routed.WORKSPACE_BYTES]] = workspace.ctypes.data, workspace.size


class NumbaBackend:
    """SIMD kernels by ISA on the team of threads; one call per layer.

    Safe to share between threads: calls of one backend queue. Two backends run at the same time.
    """

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        self.choice: IsaChoice = detect()
        self.n_threads = resolve_threads(threads)
        self._plans: dict[ExpertSpec | LinearSpec, Plan] = {}
        self._last_plan: tuple[ExpertSpec | None, Plan | None] = (None, None)
        self._sizes: dict[tuple[int, int, int, int], tuple[Plan, int, int, ExpertSpec]] = {}
        """Of calls seen before: plan, bytes of workspace, bytes of weights. By shape and by the id of the spec, which
        is kept here, so that no other can have it: hashing one is a call of Python."""
        self._sheets: dict[tuple[int, int, int, int], Sheet] = {}
        """Of whole calls, by spec and records in the same way, tokens, and experts of a token."""
        self._workspace = np.empty(0, np.uint8)
        self._outputs = Outputs()
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
        plan = self._plan_of(spec)
        n_threads = self._threads_for(spec.record_bytes * positions.size)
        with self._lock:
            bad = layer.run_layer(
                plan.vector,
                plan.parameters,
                records,
                positions,
                dispatch.offsets,
                dispatch.rows,
                dispatch.weights,
                dispatch.top_k,
                hidden,
                out_rows,
                self._room(plan, positions.size, dispatch.n_tokens, dispatch.rows.size),
                n_threads,
            )
        if bad >= 0:
            raise_not_finite(bad)

    def run_trusted(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """`run` for at least one expert and arguments that the caller made to fit: they are not looked at again."""
        shape = id(spec), positions.size, dispatch.n_tokens, dispatch.rows.size
        sizes = self._sizes.get(shape)
        if sizes is None:
            plan = self._plan_of(spec)
            needed = layer.workspace_bytes(*shape[1:], plan.x_row_bytes, plan.h_row_bytes)
            sizes = self._sizes[shape] = plan, needed, spec.record_bytes * positions.size, spec
        plan, needed, n_bytes, _ = sizes
        several = self.n_threads > 1 and n_bytes >= SERIAL_BYTES
        n_threads = self._threads_for(n_bytes) if several else 1
        with self._lock:
            workspace = self._workspace if self._workspace.size >= needed else self._grown(needed)
            bad = layer.run_layer(
                plan.vector, plan.parameters, records, positions, dispatch.offsets, dispatch.rows, dispatch.weights,
                dispatch.top_k, hidden, out_rows, workspace, n_threads,
            )  # fmt: skip
        if bad >= 0:
            raise_not_finite(bad)

    def run_routed(
        self, spec: ExpertSpec, records: np.ndarray, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, int, int] | None:
        """A whole layer call from the router's tensors: the output, like `hidden`, and the numbers of active experts
        and of tokens.

        records: uint64 [E], addresses of all packed experts of the layer. None where this short way does not apply; the
        long one (`build_dispatch`, `run`, `combine`) then does, or says what is wrong with the input.
        """
        places = routed.places_of(hidden, index, weights, spec.hidden)
        if places is None:
            return None
        index_at, weights_at, weights_kind, n_tokens, top_k, hidden_at, hidden_kind = places
        sheet = self._sheets.get((id(spec), id(records), n_tokens, top_k))
        if sheet is None:
            sheet = self._new_sheet(spec, records, n_tokens, top_k)
        if len(helpers) < self.n_threads - 1:
            start_team(self.n_threads)
        with self._lock:
            out, out_at = self._outputs.take(hidden)
            if sheet.workspace is not self._workspace:
                sheet.work_in(self._grown(sheet.needed))
            done = routed.run_routed(sheet.address, index_at, weights_at, weights_kind, hidden_at, hidden_kind, out_at)
        if done <= routed.NOT_FINITE:
            raise_not_finite(routed.NOT_FINITE - done)
        return None if done < 0 else (out, done, n_tokens)

    def _new_sheet(self, spec: ExpertSpec, records: np.ndarray, n_tokens: int, top_k: int) -> Sheet:
        sheet = self._sheets[id(spec), id(records), n_tokens, top_k] = self.sheet(spec, records, n_tokens, top_k)
        return sheet

    def sheet(self, spec: ExpertSpec, records: np.ndarray, n_tokens: int, top_k: int) -> Sheet:
        """A new one, for compiled callers that have a workspace of their own; records: as in `run_routed`."""
        plan, n_rows, n_experts = self._plan_of(spec), n_tokens * top_k, records.size
        scratch = routed.scratch_bytes(n_tokens, n_rows, spec.hidden)
        needed = layer.workspace_bytes(min(n_rows, n_experts), n_tokens, n_rows, plan.x_row_bytes, plan.h_row_bytes)
        sheet = Sheet(spec, plan, records, needed + scratch)
        sheet.words[[routed.SCRATCH_BYTES, routed.N_TOKENS, routed.TOP_K]] = scratch, n_tokens, top_k
        sheet.words[routed.N_THREADS] = self.n_threads
        sheet.words[routed.SERIAL_EXPERTS] = (SERIAL_BYTES - 1) // spec.record_bytes
        return sheet

    def linear(self, spec: LinearSpec, address: int, x: np.ndarray, out: np.ndarray) -> None:
        """See `cpu_kernels.backends.shared.run_linear`."""
        check_linear(spec, address, x, out)
        if not x.shape[0]:
            return
        plan = self._plans.get(spec) or self._linear_plan(spec)
        with self._lock:
            bad = layer.run_linear_layer(
                plan.vector, address, x, out, self._room(plan, 1, x.shape[0], 0), self._threads_for(spec.record_bytes)
            )
        if bad >= 0:
            raise_not_finite(bad)

    def attend(
        self,
        kernels: tuple[int, int, int],
        sizes: tuple[int, int, int, int, int, int],
        scale: float,
        query: np.ndarray,
        keys: tuple[int, int, int, int],
        values: tuple[int, int, int, int],
        bias: np.ndarray,
        out: np.ndarray,
        n_bytes: int,
    ) -> None:
        """See `cpu_kernels.engine.attention_workers.run_attention`; n_bytes: of the keys and values that it reads."""
        n_batch, n_kv_heads, group, n_tokens, dim, v_dim = sizes
        needed = attention_bytes(n_batch * n_kv_heads * group, n_batch, n_tokens, dim, v_dim)
        n_threads = self._threads_for(n_bytes, SERIAL_CONTEXT_BYTES)
        with self._lock:
            run_attention(kernels, sizes, scale, query, keys, values, bias, out, self._grown(needed), n_threads)

    def _threads_for(self, n_bytes: int, serial_bytes: int = SERIAL_BYTES) -> int:
        n_threads = 1 if n_bytes < serial_bytes else self.n_threads
        if len(helpers) < n_threads - 1:
            start_team(n_threads)
        return n_threads

    def _room(self, plan: Plan, n_experts: int, n_tokens: int, n_rows: int, more_bytes: int = 0) -> np.ndarray:
        """The workspace, grown if needed and kept between calls."""
        needed = layer.workspace_bytes(n_experts, n_tokens, n_rows, plan.x_row_bytes, plan.h_row_bytes)
        return self._grown(needed + more_bytes)

    def _grown(self, n_bytes: int) -> np.ndarray:
        """The workspace with at least n_bytes."""
        if self._workspace.size < n_bytes:
            self._workspace = np.empty(n_bytes * 5 // 4, np.uint8)
        return self._workspace

    def _plan_of(self, spec: ExpertSpec) -> Plan:
        """The plan of a spec, mostly that of the call before: whether it is the same object is seen without hashing."""
        last, plan = self._last_plan
        if spec is not last or plan is None:
            plan = self._plans.get(spec) or self._expert_plan(spec)
            self._last_plan = (spec, plan)
        return plan

    def _expert_plan(self, spec: ExpertSpec) -> Plan:
        reason = self.supports(spec)
        if reason is not None:
            raise BackendError(f"backend 'numba' cannot run these experts: {reason}")
        return self._plans.setdefault(spec, expert_plan(spec, self.choice.isa.name))

    def _linear_plan(self, spec: LinearSpec) -> Plan:
        plan = linear_plan(spec.in_features, spec.out_features, spec.dtype, self.choice.isa.name)
        return self._plans.setdefault(spec, plan)

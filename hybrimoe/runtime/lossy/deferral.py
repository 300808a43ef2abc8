"""Late experts: a CPU lane that works while the model goes on, and whose result the next MoE layer adds."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from gpu_kernels.combining import combine_on_host
from gpu_kernels.streams import clock_us
from hybrimoe.errors import ModelError
from hybrimoe.runtime.layer_call.executor import Executor, LayerCall, LayerRun
from hybrimoe.runtime.layer_call.routing import Workspace
from scheduler import LayerPlan


@dataclass(frozen=True, slots=True)
class Late:
    """What a layer's late experts gave: output float32 [T, H] on the host, and what ran."""

    output: torch.Tensor
    run: LayerRun


class DeferredLane:
    """One worker thread, started by the first late experts, with at most one layer's experts at a time.

    The inputs of `start` must not change until `take` or `drop`: give it copies. `workspace` holds the result rows.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hybrimoe-late")
        self._pending: Future[Late] | None = None
        self._ends_us = 0.0
        self.workspace = Workspace()

    def start(self, plan: LayerPlan, call: LayerCall, *, trace: bool, expected_us: float) -> None:
        """Begins `plan.cpu` of a call. Raises ModelError while another layer's experts are pending, RuntimeError after
        `close`."""
        if self._pending is not None:
            raise ModelError("the late experts of a layer are still pending: take or drop them first")
        self._ends_us = clock_us() + expected_us
        self._pending = self._worker.submit(_compute, self._executor, plan, call, trace)

    def take(self, n_tokens: int) -> Late | None:
        """Waits for the pending experts; None where there are none. Raises what their computation raised, ModelError
        where they are of another number of tokens than the layer that is to add them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        late = pending.result()
        if len(late.output) != n_tokens:
            raise ModelError(
                f"deferred experts of {len(late.output)} tokens met a layer of {n_tokens}: this model's MoE layers see"
                " different tokens, so it cannot defer experts; choose another lossy policy"
            )
        return late

    def drop(self) -> None:
        """Waits for the pending experts and forgets them: the step that they belong to did not go on."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait([pending])

    def close(self) -> None:
        """Forgets what is pending and ends the thread. Safe to call twice; `start` is refused afterwards."""
        self.drop()
        self._worker.shutdown()

    def remaining_us(self) -> float:
        """Expected us until the pending experts have ended."""
        return 0.0 if self._pending is None else max(0.0, self._ends_us - clock_us())


def _compute(executor: Executor, plan: LayerPlan, call: LayerCall, trace: bool) -> Late:
    with torch.no_grad():
        run = LayerRun(plan.layer, plan.step, trace)
        executor.compute(plan, call, run)
        return Late(combine_on_host(call.work), run)

"""Deferred experts: a CPU lane that works while the model goes on, and whose result the next MoE layer adds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.host.threads import Pool
from gpu_kernels.combining import combine_on_host
from gpu_kernels.streams import clock_us
from hybrimoe.errors import ModelError
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.routing import CallInputs, CallSpace, Workspace
from hybrimoe.runtime.layer_call.stats import Counters
from scheduler.planner.plan_view import PlanView


class DeferredLane:
    """One worker thread, started by the first deferred experts, with at most one layer's experts at a time."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self._worker = Pool(1, "hybrimoe-deferred")
        self._pending: Future[torch.Tensor] | None = None
        self._ends_us = 0.0
        self._workspace = Workspace()
        n_experts = max(layer.num_experts for layer in experts.layers)
        self._spaces = [CallSpace(experts, index, layer, n_experts) for index, layer in enumerate(experts.layers)]
        self._plan = PlanView()
        self._space: CallSpace | None = None

    def space(
        self, inputs: CallInputs, index: int, ids: npt.NDArray[np.integer], weights: npt.NDArray[np.float32]
    ) -> CallSpace | None:
        """The layer's call of these experts, on copies of its inputs: they may change while it is computed.

        ids integer [T, k], -1 absent, weights float32 [T, k]. None where there is no expert.
        """
        space = self._spaces[index]
        own = CallInputs(inputs.hidden, inputs.host_hidden.copy(), ids, weights)
        n = space.take(own, ids, weights.copy(), self._workspace)
        if not n:
            return None
        dispatch = space.work.dispatch
        space.demand.expert_ids, space.demand.n_tokens = dispatch.expert_ids, dispatch.n_tokens_per_expert
        space.plan, space.step, space.traced = self._plan, self._experts.step, self._experts.tracing
        space.plan.run_on_cpu(space.step, index, n)
        return space

    def start(self, space: CallSpace, expected_us: float) -> None:
        """Begins a call made by `space`. Raises ModelError while others are pending, RuntimeError when closed."""
        if self._pending is not None:
            raise ModelError("the deferred experts of a layer are still pending: take or drop them first")
        self._ends_us = clock_us() + expected_us
        self._space = space
        self._pending = self._worker.submit(_compute, self._experts, space)

    def take(self, n_tokens: int, counters: Sequence[Counters]) -> torch.Tensor | None:
        """Waits for the pending experts; their output float32 [T, H] on the host, None where there are none.

        `counters`: of each layer, what their time is added to. Raises what their computation raised, ModelError where
        they are of another number of tokens than the layer that is to add them.
        """
        pending, self._pending, space = self._pending, None, self._space
        if pending is None or space is None:
            return None
        output = pending.result()
        if len(output) != n_tokens:
            raise ModelError(
                f"deferred experts of {len(output)} tokens met a layer of {n_tokens}: this model's MoE layers see"
                " different tokens, so it cannot defer experts; choose another lossy policy"
            )
        counters[space.index].cpu_us += space.cpu_us
        self._experts.reports.timeline += space.ran
        return output

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


def _compute(experts: Experts, space: CallSpace) -> torch.Tensor:
    with torch.no_grad():
        experts.lanes.compute(space)
        return combine_on_host(space.work)

"""What a planner decided for one layer, as the lanes perform it: positions of the demand's experts, not expert ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import COUNT, CPU
from scheduler.demand import Demand
from scheduler.plan import LayerPlan, Transfer
from scheduler.planner.decide import REUSE, new_plan

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class PlanView:
    """The workspace of one planner: filled anew by each decision, so valid until the next one.

    ``rows`` int64[5, A + 1] is the plan (``decide.new_plan``) of A active experts. ``cpu`` and ``accel`` are positions
    in execution order, ``slots[i]`` the slot of ``accel[i]``. ``moved``: the positions of ``transfers``, in
    link order; ``prefetches`` (later layers) follow them. ``awaited``: positions of accelerated experts whose earlier
    transfer is still under way. ``reads``: see ``LayerPlan``. Layers and slots are numbered as outside of the planner.
    """

    __slots__ = (
        "_plans", "_tables", "accel", "awaited", "cpu", "evicted", "layer", "makespan_us", "moved", "prefetches",
        "reads", "rows", "slot_of", "slots", "step", "transfers",
    )  # fmt: skip

    def __init__(self) -> None:
        self._plans: dict[int, Ints] = {}
        self._tables: dict[int, Floats] = {}
        self.step, self.layer = -1, -1
        self.start(0)

    def start(self, n: int) -> Floats:
        """Empties the decision for ``n`` active experts; returns the cost table float64[5, n] to be filled."""
        if n not in self._plans:
            self._plans[n], self._tables[n] = new_plan(n), np.empty((5, n))
        self.rows = self._plans[n]
        self.cpu: list[int] = []
        self.accel: list[int] = []
        self.slots: list[int] = []
        self.moved: list[int] = []
        self.slot_of: list[int] = []
        self.evicted: list[int] = []
        self.awaited: list[int] = []
        self.transfers: list[Transfer] = []
        self.prefetches: list[Transfer] = []
        self.reads: tuple[tuple[int, int], ...] = ()
        self.makespan_us = 0.0
        return self._tables[n]

    def run_on_cpu(self, step: int, layer: int, n: int) -> None:
        """The plan of a layer of which nothing has a slot: all ``n`` active experts on the CPU, in their order."""
        self.start(n)
        self.step, self.layer, self.cpu = step, layer, list(range(n))
        self.rows[CPU, :n] = self.cpu

    def take(self, rows: Ints, makespan_us: float, first_slot: int) -> list[int]:
        """Becomes the decision in ``rows``, whose slots are numbered from ``first_slot`` on outside; nothing has moved.

        Returns the slots of the accelerated experts as in ``rows``.
        """
        self.rows, self.makespan_us = rows, makespan_us
        self.cpu, self.accel, self.moved, self.slot_of, self.evicted = rows.tolist()
        for lane in (self.cpu, self.accel, self.moved):
            del lane[lane[COUNT] :]
        self.awaited, self.transfers, self.prefetches, self.reads = [], [], [], ()
        slots = list(map(self.slot_of.__getitem__, self.accel))
        self.slots = [slot + first_slot for slot in slots] if first_slot else slots
        return slots

    @property
    def hands_over(self) -> bool:
        """Whether one of its experts takes over the slot of another, which is computed before."""
        return bool(self.moved) and any(self.evicted[position] == REUSE for position in self.moved)

    def plan(self, demand: Demand) -> LayerPlan:
        """The same as a frozen value with expert ids: for traces, explanations, recordings and simulations."""
        ids = demand.expert_ids.tolist()
        return LayerPlan(
            self.step, self.layer, tuple([ids[p] for p in self.cpu]), tuple([ids[p] for p in self.accel]),
            tuple(self.slots), tuple(self.transfers), tuple(self.prefetches), self.makespan_us,
            tuple([ids[p] for p in self.awaited]), self.reads,
        )  # fmt: skip

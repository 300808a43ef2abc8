"""What a planner decided for one layer, as the lanes perform it: positions of the demand's experts, not expert ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, CPU, TRANSFER
from scheduler.demand import Demand
from scheduler.plan import LayerPlan, Transfer
from scheduler.planner.decide import EVICTED, REUSE, SLOT, new_plan

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class PlanView:
    """The workspace of one planner: filled anew by each decision, so valid until the next one.

    ``rows`` int64[5, A + 1] is the plan (``decide.new_plan``) of A active experts, of which ``n_cpu`` run on the CPU,
    ``n_accel`` on the accelerator and ``n_moved`` of these are transferred; as lists it is made when asked for.
    ``transfers`` are in link order; ``prefetches`` (later layers) follow them. ``awaited``: positions of accelerated
    experts whose earlier transfer is still under way. ``reads``: see ``LayerPlan``. Layers and slots are numbered as
    outside of the planner.
    """

    __slots__ = (
        "_first_slot", "_lists", "_plans", "_tables", "awaited", "layer", "makespan_us", "n_accel", "n_cpu", "n_moved",
        "prefetches", "reads", "rows", "step", "transfers",
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
        self.take(self._plans[n], (0, 0, 0), 0.0, 0)
        return self._tables[n]

    def run_on_cpu(self, step: int, layer: int, n: int) -> None:
        """The plan of a layer of which nothing has a slot: all ``n`` active experts on the CPU, in their order."""
        self.start(n)
        self.step, self.layer, self.n_cpu = step, layer, n
        self.rows[CPU, :n] = range(n)

    def take(self, rows: Ints, counts: Sequence[int], makespan_us: float, first_slot: int) -> None:
        """Becomes the decision in ``rows``, whose slots are numbered from ``first_slot`` on outside; nothing has moved.

        counts: how many experts are in the rows CPU, ACCEL and TRANSFER.
        """
        self.rows, self.makespan_us, self._first_slot = rows, makespan_us, first_slot
        self.n_cpu, self.n_accel, self.n_moved = counts
        self._lists: list[list[int]] | None = None
        self.awaited: list[int] = []
        self.transfers: list[Transfer] = []
        self.prefetches: list[Transfer] = []
        self.reads: tuple[tuple[int, int], ...] = ()

    def lists(self) -> list[list[int]]:
        """``rows`` as lists, made when somebody asks for the first of them."""
        if self._lists is None:
            self._lists = self.rows.tolist()
        return self._lists

    def accelerated(self) -> tuple[list[int], list[int]]:
        """Positions that the accelerator computes, in this order, and the slot of each."""
        if self._lists is None:
            self._lists = self.rows.tolist()
        lists, first_slot = self._lists, self._first_slot
        accel = lists[ACCEL][: self.n_accel]
        slots = list(map(lists[SLOT].__getitem__, accel))
        return accel, [slot + first_slot for slot in slots] if first_slot else slots

    @property
    def cpu(self) -> list[int]:
        """Positions that the CPU computes, in this order."""
        return self.lists()[CPU][: self.n_cpu]

    @property
    def accel(self) -> list[int]:
        """Positions that the accelerator computes, in this order."""
        return self.accelerated()[0]

    @property
    def slots(self) -> list[int]:
        """Of each of ``accel``."""
        return self.accelerated()[1]

    @property
    def moved(self) -> list[int]:
        """Positions of ``transfers``."""
        return self.lists()[TRANSFER][: self.n_moved]

    @property
    def slot_of(self) -> list[int]:
        """By position, numbered as inside of the planner; -1 where the accelerator does not compute it."""
        return self.lists()[SLOT]

    @property
    def evicted(self) -> list[int]:
        """By position, see ``decide.EVICTED``."""
        return self.lists()[EVICTED]

    @property
    def hands_over(self) -> bool:
        """Whether one of its experts takes over the slot of another, which is computed before."""
        return any(self.evicted[position] == REUSE for position in self.moved)

    def plan(self, demand: Demand) -> LayerPlan:
        """The same as a frozen value with expert ids: for traces, explanations, recordings and simulations."""
        ids = demand.expert_ids.tolist()
        return LayerPlan(
            self.step, self.layer, tuple([ids[p] for p in self.cpu]), tuple([ids[p] for p in self.accel]),
            tuple(self.slots), tuple(self.transfers), tuple(self.prefetches), self.makespan_us,
            tuple([ids[p] for p in self.awaited]), self.reads,
        )  # fmt: skip

"""Turns the plans of a step into nodes and dependency edges."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scheduler.graph.tasks import Durations, EdgeKind, PlannedLayer, Task
from scheduler.plan import Transfer
from scheduler.records import NO_EXPERT, Lane, TaskKind

if TYPE_CHECKING:
    import networkx as nx

ExpertKey = tuple[int, int]


class GraphBuilder:
    """Adds layers in execution order and remembers who wrote and who reads each slot.

    Edges: ``data`` from a producer to its consumer (a read from disk is that of the CPU or of the copy that reads the
    bytes), ``slot`` from the last readers of a slot to the transfer
    that overwrites it. The order of each lane is kept beside the graph (``lane_order``): it is a property of
    the executor (every lane is first in, first out), not of the data.
    """

    def __init__(self, durations: Durations, expert_bytes: int) -> None:
        import networkx as nx  # a graph is built when asked for; every start would pay for it

        self.graph: nx.DiGraph[int] = nx.DiGraph()
        self.lane_order: dict[str, list[int]] = {"cpu": [], "accel": [], "link": [], "disk": []}
        self._indices: dict[Lane, int] = {}
        self.tasks: list[Task] = []
        self._durations = durations
        self._expert_bytes = expert_bytes
        self._writer: dict[int, int] = {}  # slot -> transfer task
        self._readers: dict[int, list[int]] = {}  # slot -> compute tasks since the last write
        self._last_read: dict[ExpertKey, int] = {}
        self._last_combine: int | None = None

    def add_layer(self, item: PlannedLayer) -> None:
        """Add the tasks of one layer and the transfers planned during it."""
        plan, dense = item.plan, item.dense
        self._indices = {"accel": item.accelerator, "link": item.link}
        attention = self._add(dense.lane, "attention", plan.layer, plan.step, dense.attention_us, after=self._tail())
        gate = self._add(dense.lane, "gate", plan.layer, plan.step, dense.gate_us, after=[attention])
        shared = self._add_shared(item, gate)
        for layer, expert in plan.reads:
            self._last_read[layer, expert] = self._add(
                "disk", "read", layer, plan.step, self._durations.read_us(layer), expert=expert,
                n_bytes=self._expert_bytes, after=[gate],
            )  # fmt: skip
        computes = self._add_experts(item, gate)
        transfers = self._add_transfers(plan.transfers, "transfer", plan.step, plan.layer, gate)
        transfers += self._add_transfers(plan.prefetches, "prefetch", plan.step, plan.layer, gate)
        self._connect_slots(item, computes, transfers)
        ends = [*shared, *computes.values()]
        self._last_combine = self._add(
            dense.lane, "combine", plan.layer, plan.step, dense.combine_us, after=ends or [gate]
        )

    def _tail(self) -> list[int]:
        return [] if self._last_combine is None else [self._last_combine]

    def _add(
        self,
        lane: Lane,
        kind: TaskKind,
        layer: int,
        step: int,
        duration_us: float,
        *,
        expert: int = NO_EXPERT,
        n_tokens: int = 0,
        n_bytes: int = 0,
        slot: int = -1,
        after: Iterable[int] = (),
    ) -> int:
        accelerator = self._indices.get(lane, 0)
        task = Task(len(self.tasks), lane, kind, layer, step, duration_us, expert, n_tokens, n_bytes, slot, accelerator)
        self.tasks.append(task)
        self.graph.add_node(task.id, task=task)
        self.lane_order.setdefault(task.lane_name, []).append(task.id)
        for source in after:
            self._edge(source, task.id, "data")
        return task.id

    def _edge(self, source: int, target: int, kind: EdgeKind) -> None:
        if source != target:
            self.graph.add_edge(source, target, kind=kind)

    def _add_shared(self, item: PlannedLayer, gate: int) -> list[int]:
        if item.dense.shared_us <= 0.0:
            return []
        plan = item.plan
        return [self._add(item.dense.lane, "shared_expert", plan.layer, plan.step, item.dense.shared_us, after=[gate])]

    def _add_experts(self, item: PlannedLayer, gate: int) -> dict[tuple[str, int], int]:
        """Compute tasks by (lane, expert), in lane order."""
        plan, demand = item.plan, item.demand
        tokens = dict(zip(demand.expert_ids.tolist(), demand.n_tokens.tolist(), strict=True))
        added: dict[tuple[str, int], int] = {}
        for lane, kind, experts, slots in (
            ("cpu", "cpu_expert", plan.cpu, (-1,) * len(plan.cpu)),
            ("accel", "accel_expert", plan.accel, plan.accel_slots),
        ):
            for expert, slot in zip(experts, slots, strict=True):
                n_tokens = tokens.get(expert, 0)
                added[lane, expert] = self._add(
                    lane,  # type: ignore[arg-type]
                    kind,  # type: ignore[arg-type]
                    plan.layer,
                    plan.step,
                    self._expert_us(lane, plan.layer, n_tokens),
                    expert=expert,
                    n_tokens=n_tokens,
                    slot=slot,
                    after=[gate, *self._read_of(plan.layer, expert)] if lane == "cpu" else [gate],
                )
        return added

    def _read_of(self, layer: int, expert: int) -> list[int]:
        """The read that brought an expert into host memory, if it is in the graph."""
        found = self._last_read.get((layer, expert))
        return [] if found is None else [found]

    def _expert_us(self, lane: str, layer: int, n_tokens: int) -> float:
        cost = self._durations.cpu_us if lane == "cpu" else self._durations.accel_us
        return float(cost(layer, np.array([n_tokens], dtype=np.int32))[0])

    def _add_transfers(
        self, transfers: Sequence[Transfer], kind: TaskKind, step: int, layer: int, gate: int
    ) -> list[tuple[Transfer, int, int]]:
        """Adds (evict, copy) pairs in link order; returns (transfer, first task, copy task)."""
        added = []
        for transfer in transfers:
            first = None
            if transfer.evicts is not None:
                first = self._add("link", "evict", transfer.evicts[0], step, 0.0, expert=transfer.evicts[1],
                                  slot=transfer.slot, after=[gate])  # fmt: skip
            copy = self._add(
                "link",
                kind,
                transfer.layer,
                step,
                self._durations.transfer_us(transfer.layer),
                expert=transfer.expert,
                n_bytes=self._expert_bytes,
                slot=transfer.slot,
                after=[gate if first is None else first, *self._read_of(transfer.layer, transfer.expert)],
            )
            added.append((transfer, copy if first is None else first, copy))
        return added

    def _connect_slots(
        self,
        item: PlannedLayer,
        computes: dict[tuple[str, int], int],
        transfers: list[tuple[Transfer, int, int]],
    ) -> None:
        """Writer -> reader and reader -> next writer edges of this layer, slot by slot in link order."""
        plan = item.plan
        unread = {(plan.layer, expert): slot for expert, slot in zip(plan.accel, plan.accel_slots, strict=True)}
        incoming = {(transfer.layer, transfer.expert) for transfer, _, _ in transfers}
        for key, slot in list(unread.items()):
            if key not in incoming:
                self._read(slot, computes["accel", key[1]])
                del unread[key]
        for transfer, first, copy in transfers:
            for reader in self._readers.pop(transfer.slot, []):
                self._edge(reader, first, "slot")
            previous = self._writer.get(transfer.slot)
            if previous is not None:
                self._edge(previous, first, "slot")
            self._writer[transfer.slot] = copy
            if unread.pop((transfer.layer, transfer.expert), None) is not None:
                self._read(transfer.slot, computes["accel", transfer.expert])

    def _read(self, slot: int, compute: int) -> None:
        writer = self._writer.get(slot)
        if writer is not None:
            self._edge(writer, compute, "data")
        self._readers.setdefault(slot, []).append(compute)


def build(
    items: Iterable[PlannedLayer], durations: Durations, expert_bytes: int
) -> tuple["nx.DiGraph[int]", dict[str, list[int]], list[Task]]:
    """Graph, lane orders and tasks of ``items`` in execution order."""
    builder = GraphBuilder(durations, expert_bytes)
    for item in items:
        builder.add_layer(item)
    return builder.graph, builder.lane_order, builder.tasks

"""The lanes of a layer call: a plan's transfers, its work on the accelerator, its experts on the CPU, the sum of rows.

Order of submission is what makes a plan safe: every computation is submitted after the transfer that it needs and
before a transfer that rewrites its slot; the accelerator's own rules (see gpu_kernels.accelerator) turn that order into
waits. The CPU lane then runs in the calling thread (its kernels release the GIL), and `combine` waits for the rest.
Rows are added in top-k order, so the result does not depend on which lane ran first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import ceil, inf, isinf
from statistics import median
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.dispatch import take_records
from gpu_kernels import LaneError
from gpu_kernels.combining import combine_on_host
from gpu_kernels.exchange import Exchange
from hybrimoe.runtime.layer_call.compiled import place_pairs
from hybrimoe.runtime.layer_call.failures import failed_experts, with_story
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.reports import OBSERVE_EVERY
from hybrimoe.runtime.layer_call.routing import CallSpace
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.slots import CopiesUnderWay, TransferQueue
from hybrimoe.runtime.layer_call.stats import Counters
from hybrimoe.runtime.store import ExpertStore
from hybrimoe.runtime.tier.cache import HostCache
from hybrimoe.runtime.tier.store import TieredStore
from scheduler import Phase, Transfer
from scheduler.balancing.problem import CPU, TRANSFER
from scheduler.planner.protocol import LayerPlanner
from scheduler.records import TaskRecord

SUBMISSIONS = 9
"""Calls by whose median the time of a submission is told: kernels may be compiled in the first of them."""
FORGETS = 1.02
"""By how much the least time of a piece of work is believed to have grown until the next."""


class Lanes:
    """What runs the experts of all layers. All methods work on the `CallSpace` of a layer's planned call, in the order
    in which they stand here.

    `queues`: one for each accelerator; none: everything runs on the CPU lane. `queue_of`: each layer's. `planner`:
    None where nothing has a slot. `tier`: the host cache where experts are read from disk; `want` then comes first.
    """

    def __init__(
        self, layers: Sequence[Layer], store: ExpertStore, planner: LayerPlanner | None,
        queues: Sequence[TransferQueue], queue_of: Sequence[int],
    ) -> None:  # fmt: skip
        self.store, self.queues, self._planner = store, list(queues), planner
        self.queue_of: list[TransferQueue | None] = [None] * len(layers)
        """Each layer's."""
        if queues:
            self.queue_of = [self.queues[unit] for unit in queue_of]
        self._piece_us = inf
        """The least that the host took lately to submit a piece of work to an accelerator."""
        self._submitting_us: deque[float] = deque(maxlen=SUBMISSIONS)
        """Of the latest prompts' calls: until all was submitted to a device, and the CPU's experts could begin."""
        self._runs = [_runner_of(layer) for layer in layers]
        self.addresses = [store.addresses(index) for index in range(len(layers))]
        self.tiered = store if isinstance(store, TieredStore) else None
        self.tier: HostCache | None = None if self.tiered is None else self.tiered.cache
        if self.tier is not None:
            self.tier.copies = None if planner is None else CopiesUnderWay(self.queues, planner)

    def link_busy_us(self, layer: int) -> float:
        """Expected us until the transfers under way have ended on the link of the layer's accelerator."""
        queue = self.queue_of[layer]
        if queue is None or self._planner is None or not queue.pending:
            return 0.0
        return queue.busy_us(perf_counter_ns() * 1e-3, self._planner.costs.transfer_us)

    def cpu_ready_us(self) -> float:
        """Expected us until the calling thread has submitted the work of a prompt's call, and computes the CPU's
        experts. 0 where devices have no memory of their own: it is too short to count there."""
        return median(self._submitting_us) if self._submitting_us else 0.0

    def took_to_submit(self, space: CallSpace, us: float) -> None:
        """`submit` of a prompt's call took so long."""
        queue = self.queue_of[space.index]
        if queue is not None and queue.accelerator.needs_pinned_host():
            self._submitting_us.append(us)

    def want(self, space: CallSpace, phase: Phase, counters: Counters) -> None:
        """The routing is known: all experts that are neither in a slot nor in host memory begin to be read."""
        tier, demand = self.tier, space.demand
        if tier is None:
            return
        demand.phase, ids = phase, demand.expert_ids
        if self._planner is not None:
            table, own = self._planner.table(space.index)
            ids = ids[table.slot_of[own * table.n_experts + ids] < 0]
        counters.disk_reads += tier.demand(demand, ids)

    def submit(self, space: CallSpace) -> None:
        """Starts the plan's transfers and its work on the accelerator; `compute` and `combine` must follow."""
        plan, queue = space.plan, self.queue_of[space.index]
        if queue is None:
            return
        if plan.n_moved or plan.awaited or space.traced:
            turns = self._interleave(space, queue)
            if self.tier is None:
                deque(turns, maxlen=0)  # nothing waits for the disk
            else:
                space.turns = None, turns
                self._submit_what_is_read(space, self.tier)
            return
        if plan.n_accel:
            accel, slots = plan.accelerated()
            self._send(space, queue, accel, queue.own_slots(slots) if queue.first_slot else slots)
        if plan.prefetches:
            self.start_transfers(plan.prefetches, space.step, traced=space.traced)

    def waits_for_disk(self, transfers: Sequence[Transfer]) -> bool:
        """Whether one of the transfers' experts is still to be read into host memory."""
        tier = self.tier
        return tier is not None and not all(tier.has(transfer.layer, transfer.expert) for transfer in transfers)

    @staticmethod
    def _submit_what_is_read(space: CallSpace, tier: HostCache) -> None:
        """Goes on with a plan's transfers and the work between them, up to the first that is still to be read."""
        assert space.turns is not None
        waiting, turns = space.turns
        while waiting is None or tier.has(waiting.layer, waiting.expert):
            waiting = next(turns, None)
            if waiting is None:
                space.turns = None
                return
        space.turns = waiting, turns

    def place(self, space: CallSpace, exchange: Exchange) -> None:
        """Tells the device where the pairs of a call that an exchange carries are computed; `launch` must follow."""
        plan, dispatch = space.plan, space.work.dispatch
        place_pairs(
            plan.rows, plan.n_cpu, plan.n_accel, dispatch.offsets, dispatch.rows, exchange.slots, exchange.source
        )  # fmt: skip

    def launch(
        self, space: CallSpace, call: SentCall, n_accel: int, transfers: Sequence[Transfer] = (),
        awaited: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """`submit` of a call that an exchange carries: one launch of recorded work for its `n_accel` experts on the
        accelerator, behind `transfers` and earlier copies into the slots `awaited`; `compute` must follow. Not for
        plans in which one expert takes over another's slot."""
        if transfers:
            self.start_transfers(transfers, space.step, traced=False)
        if n_accel and call.graph is not None:
            timed = not space.step % OBSERVE_EVERY
            end = call.accelerator.launch(call.graph.replay, awaited, timed=timed)
            if end is not None:
                space.ends.append(end)
                space.stands_for, space.recorded = OBSERVE_EVERY, True

    def _interleave(self, space: CallSpace, queue: TransferQueue) -> Iterator[Transfer]:
        """Submits work and transfers in turn, so that each computation sees the slot contents that the plan means.

        Experts that arrive are computed one by one, or so many at once as arrive while the host submits a piece of
        work. Where experts are read from disk, yields each transfer before it starts it: the expert must be in host
        memory then.
        """
        may_wait = self.tier is not None
        plan, sent, begun, arriving = space.plan, 0, 0, 0
        (accel, slots), moved = plan.accelerated(), plan.lists()[TRANSFER][: plan.n_moved]
        if queue.first_slot:
            slots = queue.own_slots(slots)
        space.work.in_turn = slots, accel
        at_once = 1
        if plan.n_moved > 1 and not (may_wait or space.traced):
            at_once = self._arrivals_at_once(space.index)
        for at, position in enumerate(accel):
            needed = moved.index(position) if position in moved else -1
            arrives = needed >= 0 or position in plan.awaited
            if at > begun and (
                space.traced
                or (arrives and arriving in (0, at_once))
                or any(
                    transfer.slot - queue.first_slot in slots[begun:at]
                    for transfer in plan.transfers[sent : needed + 1]
                )
            ):
                self._send(space, queue, accel[begun:at], slots[begun:at])
                begun, arriving = at, 0
            arriving += arrives
            if needed >= sent:
                for transfer in plan.transfers[sent : needed + 1]:
                    if may_wait:
                        yield transfer
                    self.start_transfers((transfer,), space.step, traced=space.traced)
                sent = needed + 1
        if begun < len(accel):
            self._send(space, queue, accel[begun:], slots[begun:])
        for transfer in plan.transfers[sent:]:
            if may_wait:
                yield transfer
            self.start_transfers((transfer,), space.step, traced=space.traced)
        if plan.prefetches:
            self.start_transfers(plan.prefetches, space.step, traced=space.traced)

    def _arrivals_at_once(self, layer: int) -> int:
        """Experts of a layer that cross the link while the host submits one piece of work."""
        planner = self._planner
        transfer_us = 0.0 if planner is None else planner.costs.transfer_us(layer)
        if transfer_us <= 0.0 or isinf(self._piece_us):
            return 1
        return max(1, ceil(self._piece_us / transfer_us))

    def _send(self, space: CallSpace, queue: TransferQueue, positions: list[int], slots: list[int]) -> None:
        """Submits accelerator experts as one piece of work; slots are the accelerator's own."""
        if queue.prepares:
            queue.before_compute(space.index, space.demand.expert_ids, positions, slots)
        start_ns = perf_counter_ns()
        space.ends.append(queue.accelerator.run_experts(space.layer.spec, slots, positions, space.work))
        self._piece_us = min((perf_counter_ns() - start_ns) * 1e-3, self._piece_us * FORGETS)
        space.sent.append(positions)

    def start_transfers(self, transfers: Sequence[Transfer], step: int, *, traced: bool) -> None:
        """Submits transfers in the order of their links."""
        for transfer in transfers:
            queue = self.queue_of[transfer.layer]
            assert queue is not None
            queue.submit(transfer, self.store.record(transfer.layer, transfer.expert), step, traced=traced)

    def read_back(self, layer: int, expert: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """The record of an expert that is in a slot, uint8 [n_bytes], as the accelerator has it."""
        queue, planner = self.queue_of[layer], self._planner
        assert queue is not None
        assert planner is not None
        slot = next(slot for slot, held in planner.contents().items() if held == (layer, expert))
        return queue.accelerator.read_slot(slot - queue.first_slot, n_bytes)

    def compute(self, space: CallSpace) -> None:
        """The CPU lane's experts, in the calling thread: all in one call, or one by one when traced."""
        n = space.plan.n_cpu
        if self.tier is not None:
            self._compute_as_read(space, n, self.tier)
            return
        if n:
            taken = space.positions[:n], space.records[:n]
            ids = space.work.dispatch.expert_ids
            take_records(self.addresses[space.index], ids, space.plan.rows[CPU, :n], *taken)
        self.compute_taken(space, n)

    def compute_taken(self, space: CallSpace, n: int) -> None:
        """`compute` of the first `n` of the space's positions and records."""
        work, layer = space.work, space.layer
        space.cpu_us, space.n_cpu = 0.0, n
        space.ran.clear()
        positions, records = space.positions[:n], space.records[:n]
        work.host_positions = positions
        if not n:
            return
        run, rest = self._runs[space.index], (work.dispatch, work.host_hidden, work.host_rows)
        if space.traced:
            self._compute_one_by_one(
                space, lambda at: run(layer.spec, records[at : at + 1], positions[at : at + 1], *rest)
            )
            return
        start_ns = perf_counter_ns()
        run(layer.spec, records, positions, *rest)
        space.cpu_us = (perf_counter_ns() - start_ns) * 1e-3

    def _compute_as_read(self, space: CallSpace, n: int, tier: HostCache) -> None:
        """`compute` where experts are read from disk: first those that are in memory, then each as it comes, and so
        for transfers."""
        work, layer, index = space.work, space.layer, space.index
        space.cpu_us, space.n_cpu = 0.0, n
        space.ran.clear()
        positions = space.positions[:n]
        positions[:] = space.plan.rows[CPU, :n]
        work.host_positions, left = positions, positions.copy()
        run, rest = self._runs[index], (work.dispatch, work.host_hidden, work.host_rows)
        while left.size or space.turns is not None:
            start_ns = perf_counter_ns()
            asked = work.dispatch.expert_ids[left]
            if space.turns is not None and space.turns[0] is not None:
                asked = np.append(asked, space.turns[0].expert)
            there = tier.ready(index, asked)[: left.size]
            if space.turns is not None:
                self._submit_what_is_read(space, tier)
            if space.traced:
                there[np.flatnonzero(there)[1:]] = False
            begin_ns = perf_counter_ns()
            space.counters.disk_wait_us += (begin_ns - start_ns) * 1e-3
            if not there.any():
                continue
            now, left = left[there], left[~there]
            ids = work.dispatch.expert_ids[now]
            run(layer.spec, self.addresses[index][ids], now, *rest)
            end_ns = perf_counter_ns()
            space.cpu_us += (end_ns - begin_ns) * 1e-3
            tier.done(index, ids)
            if space.traced:
                space.ran.append(self._ran_on_cpu(space, int(now[0]), begin_ns * 1e-3, end_ns * 1e-3))

    @staticmethod
    def _ran_on_cpu(space: CallSpace, position: int, start_us: float, end_us: float) -> TaskRecord:
        """An expert of a traced call as a timeline entry."""
        expert, n_tokens = int(space.demand.expert_ids[position]), int(space.demand.n_tokens[position])
        return TaskRecord("cpu", "cpu_expert", space.index, expert, n_tokens, 0, start_us, end_us, space.step)

    def _compute_one_by_one(self, space: CallSpace, run: Callable[[int], None]) -> None:
        """`compute` with a record for each expert."""
        for at, position in enumerate(space.plan.cpu):
            start_us = perf_counter_ns() * 1e-3
            run(at)
            end_us = perf_counter_ns() * 1e-3
            space.cpu_us += end_us - start_us
            space.ran.append(self._ran_on_cpu(space, position, start_us, end_us))

    def combine(self, space: CallSpace) -> torch.Tensor:
        """Waits for the accelerator; the layer's output, float32 [T, H] or as the hidden states are.

        It is on the accelerator's device if that computed some of it, else on the host; a norm over the experts'
        outputs runs where its weights are. Raises LaneError, with the story of the experts, where the lane failed.
        """
        queue, work = self.queue_of[space.index], space.work
        on_device = work.transform is not None and work.hidden.device.type != "cpu"
        if queue is None or not (space.ends or on_device):
            return combine_on_host(work)
        try:
            return queue.accelerator.combine(work, space.ends)
        except LaneError as error:
            raise with_story(error, self._planner, space.index, failed_experts(space)) from error

    def unit_of(self, layer: int) -> int:
        """The number of the layer's accelerator."""
        queue = self.queue_of[layer]
        return 0 if queue is None else queue.unit


def _runner_of(layer: Layer) -> Callable[..., None]:
    """`run` of the layer's backend; without its checks where there is such a way: what is given here fits."""
    backend = layer.backend
    if isinstance(backend, NumbaBackend):
        return backend.run_trusted
    return lambda *arguments: None if backend is None else backend.run(*arguments)

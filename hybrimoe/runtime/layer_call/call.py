"""One call of a layer's experts, top to bottom: read the routing, plan, submit, compute, combine, collect.

Where nothing has a slot, a call of few tokens is one compiled call from the router's tensors to the output. Where the
planner's decision is compiled, reading and planning are one (`hybrimoe.runtime.layer_call.choosing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.routed import Places, places_of
from gpu_kernels.waiting import wait_for_stream
from hybrimoe.runtime.layer_call.choosing import AtOnce, Choice
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.predicting import RoutingRecorder, predict, record
from hybrimoe.runtime.layer_call.routing import CallSpace
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.stages import LossyStage
from hybrimoe.runtime.layer_call.stats import MOST_UNCOUNTED
from hybrimoe.runtime.layer_call.steps import Step, StepTracker
from hybrimoe.runtime.layer_call.tallies import OVERHEAD_US, WALL_US
from scheduler import Phase, Planner, Transfer
from scheduler.forecast.read_ahead import LAYERS_AHEAD
from scheduler.graph import PlannedLayer
from scheduler.planner.at_once import HANDS_ON
from scheduler.records import TaskRecord

WholeCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, int, int] | None]
"""(hidden, top_k_index, top_k_weights) -> (output, number of active experts, of tokens), or None for what the long way
runs."""


class ExpertsCall:
    """Runs the calls of all layers of a started session.

    `experts`: the experts as stored. `lossy`: a stage that rewrites the routing, and may send parts of it to other
    experts (low-precision copies) or to a later layer; None computes what the router asked for.
    """

    def __init__(self, experts: Experts, tracker: StepTracker, lossy: LossyStage | None = None) -> None:
        self.experts, self.tracker, self.lossy = experts, tracker, lossy
        self.every = [experts] if lossy is None or lossy.low is None else [experts, lossy.low]
        self.layers, self.planner, self.costs = experts.layers, experts.planner, experts.costs
        self._lookahead: Lookahead | None = None
        self.routing_recorder: RoutingRecorder | None = None
        for others in self.every[1:]:
            others.reports.timeline = experts.reports.timeline
        self.phase: Phase = "prefill"
        self.consistent = True
        """False while a call runs, and after one that did not end: slots and plans may then disagree."""
        self._whole: list[WholeCall | None] = [None] * len(self.layers)
        if experts.planner is None and lossy is None and experts.lanes.tier is None:
            self._whole = list(map(_whole_call, self.layers, experts.lanes.addresses))
        self._alone = [(space,) for space in experts.spaces]
        self.at_once: AtOnce | None = None
        """What decides on calls of few tokens, where the planner can."""
        self.link_free_us = 0.0
        """By the host's clock: when the copies that were under way will have ended, as of the latest sent call."""
        self._released: tuple[CallSpace, Choice] | None = None
        """A sent call whose output is there, and for which `settle` has something to do."""
        self.lookahead = None

    @property
    def lookahead(self) -> Lookahead | None:
        """What predicts the routing of later layers; None: nothing does."""
        return self._lookahead

    @lookahead.setter
    def lookahead(self, lookahead: Lookahead | None) -> None:
        self._lookahead = lookahead
        alone = self.lossy is None and self.experts.lanes.tier is None
        if alone and isinstance(self.planner, Planner) and self.planner.decides_at_once:
            self.at_once = AtOnce(self.experts, self.planner, lookahead)

    def run(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One call of layer `index`; see HybridExperts.forward."""
        start_ns = perf_counter_ns()
        if self._released is not None:
            self.settle()
        whole = self._whole[index]
        if whole is not None and self.routing_recorder is None and not self.experts.tracing:
            output = self._run_whole(whole, index, hidden, top_k_index, top_k_weights, start_ns)
            if output is not None:
                return output
        if self.at_once is not None and self.routing_recorder is None and not self.experts.tracing:
            output = self._run_at_once(self.at_once, index, hidden, top_k_index, top_k_weights, start_ns)
            if output is not None:
                return output
        parts, n_tokens = self._read(index, hidden, top_k_index, top_k_weights)
        if not n_tokens:
            return torch.zeros_like(hidden)
        lanes_ns = 0
        for space in parts:
            self._plan(space, parts, top_k_index)
            begin_ns = perf_counter_ns()
            space.experts.lanes.submit(space)
            took_ns = perf_counter_ns() - begin_ns
            lanes_ns += took_ns
            if self.phase == "prefill":
                space.experts.lanes.took_to_submit(space, took_ns * 1e-3)
        lanes_ns -= perf_counter_ns()
        output = self._compute(index, parts)
        lanes_ns += perf_counter_ns()
        for space in parts:
            space.experts.reports.finish(space)
        if output.dtype is not hidden.dtype or output.device != hidden.device or output.shape != hidden.shape:
            output = self._as_asked(output, hidden)
        self._count(self.experts.spaces[index], perf_counter_ns() - start_ns, lanes_ns)
        return output

    def run_sent(self, call: SentCall) -> None:
        """One call of a layer whose tensors the device has sent, and the host has waited for; its output, or what the
        device makes it of, is then in the call's exchange. `settle` may then be called, once the device goes on."""
        start_ns, index, exchange = perf_counter_ns(), call.layer, call.exchange
        if self._released is not None:
            self.settle()
        whole = self._whole[index]
        if whole is not None:
            output = self._run_whole(whole, index, exchange.hidden, exchange.ids, exchange.weights, start_ns)
            if output is not None:
                exchange.put(output)
                return
        if self.at_once is not None and self._answer(self.at_once, call, start_ns):
            return
        parts, n_tokens = self._read(index, exchange.hidden, exchange.ids, exchange.weights, exchange.places)
        if not n_tokens:
            exchange.put_nothing()
            return
        (space,) = parts
        space.work.hidden, space.work.host_rows = call.hidden, exchange.rows
        self._plan(space, parts, exchange.ids, 0.0 if self.costs is None else self.costs.launch_us(index))
        lanes, plan, lanes_ns = space.experts.lanes, space.plan, -perf_counter_ns()
        if plan.n_moved and (plan.hands_over or lanes.waits_for_disk(plan.transfers)):
            self._compute_for(call, space)
        else:
            lanes.place(space, exchange)
            lanes.launch(space, call, plan.n_accel, plan.transfers, _awaited_slots(space))
            if plan.prefetches:
                lanes.start_transfers(plan.prefetches, space.step, traced=False)
            lanes.compute(space)
        lanes_ns += perf_counter_ns()
        space.experts.reports.finish(space)
        self._count(space, perf_counter_ns() - start_ns, lanes_ns)

    def _answer(self, at_once: AtOnce, call: SentCall, start_ns: int) -> bool:
        """`run_sent` where reading and planning are one: what nobody waits for is left to `settle`. False where the
        long way runs the call, or says what is wrong with it."""
        exchange, experts, places = call.exchange, self.experts, call.exchange.places
        if places is None:
            return False
        space, lanes, n_tokens = experts.spaces[call.layer], experts.lanes, places[3]
        planner, slate, shape = at_once.planner, at_once.slates[call.layer], (n_tokens, places[4])
        known = slate is not None and slate.desk is planner.desk and slate.shape == shape
        desk = planner.desk if known else planner.desk_for(call.layer, n_tokens, n_tokens * shape[1])
        if desk is None or not (at_once.is_ready or at_once.get_ready()):
            return False
        if experts.reports.finished is not None:
            experts.reports.collect(self.phase)  # of a call that went the long way
        tracker = self.tracker
        if call.layer > tracker.last_layer:
            tracker.last_layer = call.layer
        else:
            self.begin_step(tracker.next(call.layer, n_tokens), n_tokens)
        link_us = max(self.link_free_us - start_ns * 1e-3, 0.0)
        self.consistent = False
        choice = at_once.choose(desk, space, self.phase, call.hidden, exchange.hidden, places, exchange, link_us)
        if choice.n_active <= 0:
            self.consistent = True
            if choice.n_active == 0:
                exchange.put_nothing()
            return choice.n_active == 0
        if choice.n_awaited == HANDS_ON:
            self.answer_rest(call, choice, link_us, start_ns)
            return True
        transfers: Sequence[Transfer] = ()
        awaited: Sequence[int] = ()
        choice.is_planned = choice.n_moved > 0 or choice.n_awaited != 0
        if choice.is_planned:
            at_once.take(space, choice)
            transfers, awaited = space.plan.transfers, _awaited_slots(space)
        lanes_ns = -perf_counter_ns()
        lanes.launch(space, call, choice.n_accel, transfers, awaited)
        lanes.compute_taken(space, choice.n_cpu)
        end_ns = perf_counter_ns()
        choice.took_ns, choice.lanes_ns = end_ns - start_ns, lanes_ns + end_ns
        self._released, self.consistent = (space, choice), True
        return True

    def answer_rest(self, call: SentCall, choice: Choice, link_us: float, start_ns: int) -> None:
        """A sent call on whose decision HANDS_ON was told; what nobody waits for is left to `settle`."""
        at_once, space = self.at_once, self.experts.spaces[call.layer]
        assert at_once is not None
        choice.is_planned, lanes_ns = True, -perf_counter_ns()
        at_once.decide_rest(space, link_us)
        self._compute_for(call, space)
        end_ns = perf_counter_ns()
        choice.took_ns, choice.lanes_ns = end_ns - start_ns, lanes_ns + end_ns
        self._released, self.consistent = (space, choice), True

    def settle(self) -> None:
        """What the latest sent call left to do when its output was there: experts of later layers are fetched, what was
        decided and what has ended is learnt from and counted."""
        released, at_once = self._released, self.at_once
        if released is None or at_once is None:
            return
        self._released, self.consistent, start_ns = None, False, perf_counter_ns()
        (space, choice), experts = released, self.experts
        if not choice.is_planned:
            at_once.take(space, choice)
        if at_once.foretells:
            at_once.foretell(space)
        prefetches = at_once.settle(space, self.phase)
        if prefetches:
            experts.lanes.start_transfers(prefetches, space.step, traced=False)
        experts.reports.finish(space)
        experts.reports.collect(self.phase)
        now_ns = perf_counter_ns()
        self.link_free_us = now_ns * 1e-3
        if experts.lanes.queues[0].pending:
            self.link_free_us += experts.lanes.link_busy_us(space.index)
        took_ns, spent = choice.took_ns + now_ns - start_ns, experts.stats.spent
        spent.append((space.counters, WALL_US, took_ns * 1e-3))
        spent.append((space.counters, OVERHEAD_US, (took_ns - choice.lanes_ns) * 1e-3))
        self.consistent = True

    def _run_at_once(
        self, at_once: AtOnce, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor, start_ns: int,
    ) -> torch.Tensor | None:  # fmt: skip
        """A call of few tokens where reading and planning are one: the output, or None where the long way runs the
        call, or says what is wrong with it."""
        experts, space = self.experts, self.experts.spaces[index]
        planner, slate, shape = at_once.planner, at_once.slates[index], top_k_index.shape
        known = slate is not None and slate.desk is planner.desk and slate.shape == shape
        desk = planner.desk if known else planner.desk_for(index, shape[0], shape[0] * shape[-1])
        if desk is None or space.norm is not None or not (at_once.is_ready or at_once.get_ready()):
            return None
        on_host, ids, weights = hidden, top_k_index, top_k_weights
        is_here = hidden.is_cpu
        if not is_here:
            on_host, ids, weights = experts.workspace.to_host(hidden, top_k_index, top_k_weights)
        places = places_of(on_host, ids, weights, space.layer.spec.hidden)
        if places is None or hidden.requires_grad:
            return None
        lanes = experts.lanes
        self.consistent = False
        experts.reports.collect(self.phase)
        tracker = self.tracker
        if index > tracker.last_layer:
            tracker.last_layer = index
        else:
            self.begin_step(tracker.next(index, places[3]), places[3])
        queue = lanes.queue_of[index]
        link_us = 0.0 if queue is None or not queue.pending else lanes.link_busy_us(index)
        choice = at_once.choose(desk, space, self.phase, hidden, on_host, places, None, link_us)
        if choice.n_active <= 0:
            self.consistent = True
            return None if choice.n_active else torch.zeros_like(hidden)
        if choice.n_awaited == HANDS_ON:
            at_once.decide_rest(space, link_us)
            at_once.count(space)
        elif choice.n_fetched:
            at_once.planner.prefetched(choice.n_fetched)
        out: torch.Tensor | None = None
        if is_here:  # before threads of an accelerator wait for Python's lock, which torch lets go of here
            out, _ = experts.workspace.outputs.take(hidden)
            space.work.out = out
        lanes_ns = -perf_counter_ns()
        lanes.submit(space)
        if choice.n_awaited == HANDS_ON:
            lanes.compute(space)
        else:
            lanes.compute_taken(space, choice.n_cpu)
        lanes_ns += perf_counter_ns()
        if at_once.foretells:
            at_once.foretell(space)
        lanes_ns -= perf_counter_ns()
        output = lanes.combine(space)
        lanes_ns += perf_counter_ns()
        space.experts.reports.finish(space)
        if output is not out:
            output = self._as_asked(output, hidden)
        self._count(space, perf_counter_ns() - start_ns, lanes_ns)
        return output

    def _compute_for(self, call: SentCall, space: CallSpace) -> None:
        """A planned call that cannot be launched as it was recorded: its output for the device."""
        lanes = space.experts.lanes
        lanes.submit(space)
        lanes.compute(space)
        call.exchange.put(lanes.combine(space))

    def _read(
        self, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
        places: Places | None = None,
    ) -> tuple[Sequence[CallSpace], int]:  # fmt: skip
        """The call's routing: as the router gave it, or the parts that a lossy policy makes of it; and the number of
        tokens, 0 where there is nothing to compute. What has ended is collected before; then the call is under way, and
        belongs to the current step or starts one."""
        self.consistent = False
        for experts in self.every:
            experts.reports.collect(self.phase)
        self.consistent = True  # what is wrong with the tensors is told before anything has happened
        lossy, space = self.lossy, self.experts.spaces[index]
        if lossy is None:
            n_active = space.read(hidden, top_k_index, top_k_weights, self.experts.workspace, places)
            n_tokens = space.work.dispatch.n_tokens if n_active else 0
        else:
            inputs = space.inputs(hidden, top_k_index, top_k_weights, self.experts.workspace)
            n_tokens = len(inputs.ids)
        if not n_tokens:
            return (), 0
        self.consistent = False
        self.begin_call(index, n_tokens)
        return (self._alone[index] if lossy is None else lossy.rewrite(self.phase, index, inputs)), n_tokens

    def begin_call(self, index: int, n_tokens: int) -> None:
        """Follows the steps that calls belong to, also of one that the device computes by itself."""
        step = self.tracker.next(index, n_tokens)
        if step.new:
            self.begin_step(step, n_tokens)

    def begin_step(self, step: Step, n_tokens: int) -> None:
        """Tells planners and lossy stage of a new step."""
        self.phase = step.phase
        for experts in self.every:
            experts.begin_step(step, n_tokens)
            if len(experts.stats.whole) + len(experts.stats.spent) > MOST_UNCOUNTED:
                experts.stats.add_up()
        if self.lossy is not None:
            self.lossy.begin_step(step)

    def _plan(
        self, space: CallSpace, parts: Sequence[CallSpace], top_k_index: torch.Tensor, launch_us: float = 0.0
    ) -> None:
        """Plans one part of a call, behind those before it; the predictions go to the experts as stored. launch_us:
        until the accelerator's first expert can run."""
        experts, lossy, tier = space.experts, self.lossy, self.experts.lanes.tier
        if tier is not None:
            index, phase = space.index, self.phase
            self.experts.lanes.want(space, phase, self.experts.stats.counters[phase][index])
        if lossy is None:
            cpu_ready_us = experts.lanes.cpu_ready_us() if self.phase == "prefill" else 0.0
            lanes = cpu_ready_us, launch_us, experts.lanes.link_busy_us(space.index)
        else:
            lanes = lossy.lanes(space, parts)
        if experts is not self.experts:
            experts.plan(space, self.phase, (), *lanes)
        elif self.routing_recorder is not None:
            told = record(self.routing_recorder, space, top_k_index, self.lookahead, lossy)
            experts.plan(space, self.phase, told, *lanes)
        else:
            layers_ahead = 0 if tier is None else LAYERS_AHEAD
            ahead = predict(space, top_k_index, self.lookahead, self.planner, lossy, layers_ahead)
            if tier is not None:
                tier.foretell(space.index, ahead)
            experts.plan(space, self.phase, ahead, *lanes)

    def _compute(self, index: int, parts: Sequence[CallSpace]) -> torch.Tensor:
        """The CPU lane's experts, then the output of all lanes: float32 [T, H] or as the hidden states are."""
        lossy = self.lossy
        if lossy is None:
            (space,) = parts
            lanes = space.experts.lanes
            lanes.compute(space)
            return lanes.combine(space)
        lossy.before_compute(index, self.phase)
        for space in parts:
            space.experts.lanes.compute(space)
        lossy.after_compute(index, self.phase)
        return lossy.joined(index, self.phase, [space.experts.lanes.combine(space) for space in parts])

    def _as_asked(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The output as the caller wants it: in dtype, device and shape of `hidden`."""
        output = output.to(hidden.dtype)
        if output.device != hidden.device:
            on_host = output.device.type == "cpu"
            wait_for_stream(output.device, "the work of a layer")
            move = self.experts.workspace.to_device if on_host else torch.Tensor.to
            output = move(output, hidden.device)
        return output.reshape(hidden.shape)

    def _count(self, space: CallSpace, took_ns: int, lanes_ns: int) -> None:
        """The call has ended: its time, of which the lanes took `lanes_ns`."""
        stats = self.experts.stats
        counters = stats.counters[self.phase][space.index]
        stats.spent.append((counters, WALL_US, took_ns * 1e-3))
        stats.spent.append((counters, OVERHEAD_US, (took_ns - lanes_ns) * 1e-3))
        self.consistent = True

    def _run_whole(
        self, whole: WholeCall, index: int, hidden: torch.Tensor, top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor, start_ns: int,
    ) -> torch.Tensor | None:  # fmt: skip
        """A call of few tokens without slots; None, before anything has happened, for others."""
        self.consistent = False
        kernels_ns = perf_counter_ns()
        done = whole(hidden, top_k_index, top_k_weights)
        ended_ns = perf_counter_ns()
        self.consistent = True
        if done is None:
            return None
        output, n_active, n_tokens = done
        if n_active:
            tracker, stats = self.tracker, self.experts.stats
            if index > tracker.last_layer:
                tracker.last_layer = index
            else:
                self.begin_step(tracker.next(index, n_tokens), n_tokens)
            stats.whole.append(
                (self.phase, index, n_tokens, n_active, ended_ns - kernels_ns, perf_counter_ns() - start_ns)
            )
        return output

    # What the session asks for ----------------------------------------------------------------------------------

    def take_over(self, previous: ExpertsCall) -> None:
        """Continues another one's records, hooks and counts; its slots and plans are gone."""
        self.routing_recorder = previous.routing_recorder
        for experts, before in zip(self.every, previous.every, strict=False):
            experts.tracing, experts.plans = before.tracing, before.plans
            experts.reports.tracing = before.tracing
            experts.count_in(before.routing_counts)
            experts.reports.timeline = before.reports.timeline
        if self.lookahead is not None and previous.lookahead is not None:
            self.lookahead = previous.lookahead
        if self.lossy is not None and previous.lossy is not None:
            self.lossy.take_over(previous.lossy, self.lookahead)

    def trace(self, on: bool) -> None:
        """Starts recording (dropping an earlier recording), or stops it. `plans` are those of full precision."""
        self.drain()
        timeline: list[TaskRecord] = []
        for experts in self.every:
            if on:
                experts.reports.timeline, experts.plans = timeline, []
            experts.tracing = experts.reports.tracing = on

    @property
    def timeline(self) -> list[TaskRecord]:
        """What ran while recording, in the order in which it became known."""
        return self.experts.reports.timeline

    @property
    def plans(self) -> list[PlannedLayer]:
        """Plans and demands of the recorded calls."""
        return self.experts.plans

    @property
    def routing_counts(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: calls in which each expert was active."""
        return self.experts.routing_counts

    def drain(self) -> None:
        """Waits for the work under way and reports it; completes the timeline."""
        self.settle()
        for experts in self.every:
            for queue in experts.lanes.queues:
                queue.accelerator.synchronize()
        self.report()

    def report(self) -> None:
        """Reports what has ended so far to planners and counters."""
        self.settle()
        for experts in self.every:
            experts.reports.collect(self.phase)

    def release(self) -> None:
        """Lets go of what a call that did not end keeps: its tensors may fill a device."""
        self._released = None
        for experts in self.every:
            for space in experts.spaces:
                space.release()

    def slot_contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) that it holds or will once its copy ends."""
        return {} if self.planner is None else self.planner.contents()

    def close(self) -> None:
        """Ends what only this call path uses: another one follows, or the session is closed."""
        if self.lossy is not None:
            self.lossy.close()


def _awaited_slots(space: CallSpace) -> Sequence[int]:
    """Slots into which a planned call's experts are being copied."""
    plan = space.plan
    if not (plan.awaited or plan.n_moved):
        return ()
    _, _, moved, slot_of, _ = plan.lists()
    return [slot_of[position] for position in (*plan.awaited, *moved[: plan.n_moved])]


def _whole_call(layer: Layer, addresses: npt.NDArray[np.uint64]) -> WholeCall | None:
    """The layer's call from tensors to output; None where only the long way runs it: with another backend, or with a
    norm over the experts' outputs. addresses uint64 [E]: of the packed experts."""
    backend = layer.backend
    if not isinstance(backend, NumbaBackend) or layer.transform() is not None:
        return None
    return partial(backend.run_routed, layer.spec, addresses)

"""Session: what one injected model shares at run time. Add layers, finalize, start, run them, close."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpu_kernels import ExpertDtype, ExpertSpec, ExpertWeights, unpack_expert
from gpu_kernels import Accelerator, LostError
from hybrimoe.amounts import parse_amount
from hybrimoe.errors import BudgetError, HybriMoEError, ModelError
from hybrimoe.experts import layout as experts_layout
from hybrimoe.experts.module import HybridExperts
from hybrimoe.machine.interpreter import gather_beside
from hybrimoe.runtime.budgets import Budgets, KeysAndValues, Resized, tier_of
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.exchanged import ExchangedExperts, find_exchanged
from hybrimoe.runtime.host_copy import bring_back, drop, never_moves, require_droppable
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.layers import PLACEMENTS, Layer, pack_layers
from hybrimoe.runtime.layer_call.lookahead import ProbeSink, RoutingCaptured, run_probe
from hybrimoe.runtime.layer_call.predicting import RoutingRecorder
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.layer_call.stats import SessionStats, StatsRecorder
from hybrimoe.runtime.layer_call.steps import StepTracker
from hybrimoe.runtime.learnt import RoutingFile
from hybrimoe.runtime.lossy.low_copy import LowCopy, make_low_copy
from hybrimoe.runtime.lossy.startup import lossy_call
from hybrimoe.runtime.lost import DEVICE_ERRORS, as_lost, go_on_without, lost_of, why_it_ends
from hybrimoe.runtime.resident import ResidentExperts, find_resident
from hybrimoe.runtime.snapshot import snapshot
from hybrimoe.runtime.staged import StagedPrompts, find_staged
from hybrimoe.runtime.startup.backends import backend_for, close_all, cpu_threads, open_devices
from hybrimoe.runtime.startup.budget import PlannedMemory, planned_memory
from hybrimoe.runtime.startup.startup import Frequencies, Startup
from hybrimoe.runtime.startup.units import Unit, share_layers
from hybrimoe.runtime.store import ExpertStore, LayerSpec
from hybrimoe.runtime.tier.store import TieredStore
from hybrimoe.runtime.token_loop.loop import Stop, TokenLoop
from scheduler.errors import SchedulerError
from scheduler.graph import PlannedLayer
from scheduler.plan import Placement
from scheduler.planner.protocol import Costs, LayerPlanner
from scheduler.planner.setup import PlannerSetup
from scheduler.recording.recording import Recorder, Recording
from scheduler.records import TaskRecord

SLOTS_KEPT_PERCENT = 75
"""Of the slots there are, when a call found no memory on the accelerator."""
LEAST_STREAMED_BYTES = 64 << 20
"""Experts that take less leave Python's own memory in the processor's caches: moving that would gain nothing."""


class Session:
    """Owns store, slots, lanes and planner of one model. Calls of its layers are serialised by a lock.

    A call that fails or is interrupted loses nothing but its own result: the next call first waits for the lanes
    and starts with empty slots.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        self.config = RuntimeConfig() if config is None else config
        self._lock = threading.RLock()
        self._layers: list[Layer] = []
        self._store: ExpertStore | None = None
        self._accelerators: tuple[Accelerator, ...] = ()
        self._units: list[Unit] = []
        self._resident: ResidentExperts | None = None
        self._staged: StagedPrompts | None = None
        self._staged_of: ExpertsCall | None = None
        self._exchanged: ExchangedExperts | None = None
        self._runner: ExpertsCall | None = None
        self._stats = StatsRecorder(0, 0)
        self._low: LowCopy | None = None
        self._tracker = StepTracker(self.config.decode_max_tokens)
        self._model: weakref.ref[nn.Module] | None = None
        self._sink: ProbeSink | None = None
        self._routing: RoutingFile | None = None
        self._keys_of: weakref.ref[KeysAndValues] | None = None
        self._make_planner: Callable[[PlannerSetup], LayerPlanner] = PlannerSetup.planner
        self._closed = False
        self._lost: str | None = None
        self._reporters: list[Callable[[StatsRecorder], None]] = []
        self._finalizer: weakref.finalize[..., Any] | None = None

    # Building ---------------------------------------------------------------------------------------------------

    def add_layer(
        self, path: str, module: nn.Module, placement: Placement = "hybrid", expert_dtype: ExpertDtype | None = None
    ) -> HybridExperts:
        """Registers an experts module (in the order of the model's layers) and returns what replaces it.

        Raises UnsupportedExpertsError for a module that is no experts module, ModelError after `open`.
        """
        if self._opened or self._closed:
            state = "closed" if self._closed else "already open" if self._store is None else "already finalized"
            raise ModelError(f"cannot add {path}: the session is {state}")
        if placement not in PLACEMENTS:
            raise ModelError(f"placement {placement!r} is unknown; expected one of {', '.join(PLACEMENTS)}")
        layout = experts_layout.read(module)
        spec = layout.spec(expert_dtype or self.config.expert_dtype)
        experts = HybridExperts(self, len(self._layers), layout)
        self._layers.append(Layer(path, spec, layout.num_experts, placement, layout, experts))
        return experts

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Path, spec and number of experts of each layer, in order."""
        return tuple(layer.layer_spec for layer in self._layers)

    def open(
        self, model: nn.Module | None = None, accelerator: Accelerator | Sequence[Accelerator] | None = None
    ) -> None:
        """Opens the devices and the backends of all layers; `finalize` gives the layers their weights.

        model, accelerator: as in `finalize`. Raises DeviceError, ConfigError, ModelError.
        """
        if not self._layers:
            raise ModelError("no layer was added to the session: nothing to run")
        if self._opened:
            raise ModelError("the session is already open")
        if accelerator is None:
            self._accelerators = tuple(open_devices(self.config))
        else:
            self._accelerators = tuple(accelerator) if isinstance(accelerator, Sequence) else (accelerator,)
        self._finalizer = weakref.finalize(self, close_all, self._accelerators)
        self._require_even_layers()
        if self.config.host_copy == "drop":
            require_droppable(self.config, self._accelerators)
        threads = cpu_threads(self.config, self._accelerators)
        for layer in self._layers:
            layer.backend = backend_for(self.config.backend, threads, layer.spec)
        if model is not None:
            self._model = weakref.ref(model)
            self._tracker.bind(model)

    def _require_even_layers(self) -> None:
        """Plans number the experts of all layers alike, so that slots are for as many of each."""
        counts = {layer.num_experts for layer in self._layers}
        if self._accelerators and len(counts) > 1:
            raise ModelError(
                f"the layers of this model have {min(counts)} to {max(counts)} experts, which run on the CPU only: give"
                " accelerator none (--accelerator none); slots are planned for layers with the same number"
            )

    @property
    def needs_pinned_host(self) -> bool:
        """Whether an accelerator of the open session copies experts from page-locked memory."""
        return any(device.needs_pinned_host() for device in self._accelerators)

    def finalize(
        self, model: nn.Module | None = None, *, store: ExpertStore | None = None,
        frequencies: Frequencies | None = None, accelerator: Accelerator | Sequence[Accelerator] | None = None,
    ) -> None:  # fmt: skip
        """Opens the session if it is not open yet, and fills the store; then starts, unless weights are still to come
        (meta modules).

        model: watched for prefill and decode, and searched for routers. store: ready-made records; without one the
        layers' weights are packed. frequencies: [layers, experts] activation counts that choose what is cached first.
        accelerator: open ones in place of the configured ones; the session closes them.
        Raises DeviceError, ConfigError, BudgetError, ModelError.
        """
        if self._store is not None:
            raise ModelError("the session is already finalized")
        if not self._opened:
            self.open(model, accelerator)
        deferred = store is None and any(layer.layout is not None and layer.layout.is_meta for layer in self._layers)
        if store is None:
            store = ExpertStore(self.layer_specs(), pinned=self.needs_pinned_host)
            pack_layers(self._layers, store)
        self._store = store
        if not deferred:
            self.start(frequencies)

    @property
    def _opened(self) -> bool:
        return self._finalizer is not None

    def keep_routing(self, file: RoutingFile) -> None:
        """Before the start: the session begins with what the file holds of the model's routing, and `close` keeps there
        what it has learnt (policies with a forecast)."""
        self._routing = file

    def start(self, frequencies: Frequencies | None = None) -> None:
        """Measures costs, allocates slots, makes the planner and starts the warm-up. The store must be complete."""
        with self._lock:
            if self._runner is not None:
                raise ModelError("the session was already started")
            self._stats = self._new_stats()
            model = None if self._model is None else self._model()
            self._units = share_layers(self._layers, self._accelerators, model, self.config.kv_reserve_bytes)
            if frequencies is None and isinstance(self._store, TieredStore):
                frequencies = self._store.earlier_uses
            self._start_runner(self.config.gpu_expert_slots, None, frequencies)
            if self.store.nbytes >= LEAST_STREAMED_BYTES:
                gather_beside()

    # Running ----------------------------------------------------------------------------------------------------

    def run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One call of one layer; see HybridExperts.forward."""
        with self._lock:
            if self._sink is not None:
                self._sink.top_k_index, self._sink.top_k_weights = top_k_index, top_k_weights
                raise RoutingCaptured
            while True:
                try:
                    runner = self._runner
                    if runner is None or not runner.consistent:
                        runner = self._ready()
                    if self._units and hidden.shape[:-1].numel() > 1:
                        runner.settle()
                        resident = self.resident()
                        if resident is not None:
                            output = resident.run_prompt(layer, hidden, top_k_index, top_k_weights)
                            if output is not None:
                                return output
                        staged = self.staged()
                        if staged is not None:
                            output = staged.run(layer, hidden, top_k_index, top_k_weights)
                            if output is not None:
                                return output
                    if self._staged is not None:
                        self._tell_of_prompts()
                    return runner.run(layer, hidden, top_k_index, top_k_weights)
                except DEVICE_ERRORS as error:
                    self._go_on_after(error, hidden)

    def run_sent(self, call: SentCall) -> None:
        """One call that a recorded step has sent; see `ExpertsCall.run_sent`."""
        with self._lock:
            runner = self._runner
            if runner is call.runner and runner is not None and runner.consistent:
                try:
                    if self._staged is not None:
                        self._tell_of_prompts()
                    runner.run_sent(call)
                    return
                except DEVICE_ERRORS as error:
                    self._go_on_after(error, call.hidden)
            output = self.run_layer(call.layer, call.hidden, call.ids, call.weights)
            call.exchange.put(output)

    def run_token(self, loop: TokenLoop, at: int, *, launched: bool) -> Stop | None:
        """Goes on with a token of a recorded step from its place `at`; see `TokenLoop.run`. After an error of the
        device: as far as the loop has come, and the place's call is to be run anew."""
        with self._lock:
            runner = self._runner
            if runner is not loop.runner or runner is None or not runner.consistent:
                return None
            try:
                self._tell_of_prompts()
                return loop.run(at, launched=launched)
            except DEVICE_ERRORS as error:
                at = loop.at
                self._go_on_after(error, loop.calls[min(at, len(loop.calls) - 1)].hidden)
                return at, False

    def settle(self) -> None:
        """What the latest sent call has left to do, once the device goes on with its output; see `ExpertsCall.settle`.
        Whoever does not call it has the next call do it."""
        with self._lock:
            if self._runner is not None and self._runner.consistent:
                self._runner.settle()

    def expert_spec(self, layer: int) -> ExpertSpec:
        """Shape, storage dtype and activation of a layer's experts."""
        return self._layers[layer].spec

    def read_expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's weights on the host, dequantised. Raises ModelError where a lossy policy has given some up."""
        if not self.store.complete:
            raise ModelError(
                f"{self._layers[layer].path}: some experts are kept in low precision only (scheduler.lossy), from which"
                " the weights cannot be had back; load the model again without it"
            )
        if (layer, expert) in self.store.released():
            with self._lock:
                spec = self._layers[layer].spec
                return unpack_expert(spec, self._ready().experts.lanes.read_back(layer, expert, spec.record_bytes))
        return self.store.read(layer, expert)

    def bring_back(self) -> None:
        """All experts are in host memory again, where memory.host_copy has dropped some, until slots are filled."""
        with self._lock:
            if self.store.released():
                bring_back(self.store, self._ready())

    def require_exact(self, purpose: str) -> None:
        """Raises ModelError, naming the purpose, where a lossy policy changes what the experts compute."""
        if self.config.lossy is not None:
            raise ModelError(
                f"scheduler.lossy ({self.config.lossy}) changes what the experts compute, so there is not {purpose};"
                " inject or load the model without it"
            )

    def announce_step(self, phase: str) -> None:
        """For callers that do not call the bound model: the next layer call starts a step of this phase."""
        if phase not in ("prefill", "decode"):
            raise ModelError(f"phase must be prefill or decode, found {phase!r}")
        self._tracker.announce("prefill" if phase == "prefill" else "decode")

    def resize(
        self, *, slots: int | float | str | None = None, host: int | float | str | None = None,
        kv: int | float | str | None = None,
    ) -> Resized:  # fmt: skip
        """Changes any of three budgets while the session lives, or none of them: all that are given are looked at
        before anything is given up. Call it between two steps where `kv` is given.

        slots, host: as `resize_slots` and `resize_host`. kv: what the keys and values of all replies may take together
        (a size, a share of the device's memory, or auto), where a `BatchEngine` computes them. Raises ResizeError,
        which names the budget that cannot be: all are then as before. (Slots start over, too, where only the attempt
        to allocate shows that a device has no memory for them.)
        """
        with self._lock:
            runner = self._ready()
            budgets = Budgets(
                self._store, self._keys_of, self._check_slots, lambda number: self._replace_slots(number, runner)
            )
            # Copies into slots may go on where the slots stay: what they read in host memory stays, too.
            settled = runner.report if slots is None else runner.drain
            return budgets.change(slots, host, kv, settled=settled)

    def resize_slots(self, slots: int | float | str) -> int:
        """Changes the number of slots while the session lives; contents start over with the most used experts.

        Returns the new number. Raises BudgetError for what cannot be: there are then as many slots as before, and they
        keep what they hold where it could be seen beforehand. Raises ModelError without an accelerator.
        """
        with self._lock:
            runner = self._ready()
            self._check_slots(slots)
            runner.drain()
            return self._replace_slots(slots, runner)

    def resize_host(self, budget: int | float | str) -> int:
        """Changes the host memory of experts that are read from disk while the session lives; those with the least
        expected uses leave.

        budget: a number of experts over all layers, a share of them, or a size ("8GiB"). Returns the number of experts
        that fit. Raises ModelError where all experts are in memory anyway, BudgetError for what cannot be: it is then
        as before.
        """
        with self._lock:
            runner, tier = self._ready(), tier_of(self._store)
            number = tier.slots_for(parse_amount(budget))
            runner.report()
            return tier.resize(number)

    def keep_keys(self, owner: KeysAndValues) -> None:
        """Whoever computes replies with the model from here on: `resize` tells it of another budget for keys and
        values."""
        self._keys_of = weakref.ref(owner)

    def _check_slots(self, slots: int | float | str) -> None:
        """Raises what `resize_slots` raises, as far as it can be seen without giving slots up."""
        if not self._accelerators:
            raise ModelError("there is no accelerator, so there are no slots to resize")
        startup = self._startup()
        if self._low is None:
            startup.check(slots)
        else:  # slots of the low-precision copy make room for the others
            startup.slots_of(slots)

    def _replace_slots(self, slots: int | float | str, runner: ExpertsCall) -> int:
        used = runner.routing_counts if runner.routing_counts.any() else None
        try:
            self._start_runner(slots, runner, used)
        except HybriMoEError:
            self._start_runner(None, runner, used)  # what the slots held may be gone
            raise
        return self.n_slots

    def change_policy(self, policy: str) -> None:
        """Plans by another policy while the session lives; slots start over with the most used experts, costs stay.

        policy: a preset, or balance/prefetch/cache. What it compiles is best compiled before
        (`scheduler.planner.rehearsal`): layers do not run meanwhile. Raises PolicyError for one that there is not, or
        that needs the future, as oracles do, ModelError where nothing is planned; all is then as before.
        """
        with self._lock:
            runner, before = self._ready(), self.config
            if runner.planner is None:
                raise ModelError("no expert has a slot, so there is nothing that a policy would decide")
            if before.host_copy == "drop" and not never_moves(policy):
                raise ModelError(
                    f"policy {policy!r} moves experts, and those in slots have no copy in host memory"
                    " (memory.host_copy: drop): start with keep to change to it"
                )
            runner.drain()
            used = runner.routing_counts if runner.routing_counts.any() else None
            self.config = replace(before, policy=policy, policy_params={})
            try:
                self._start_runner(None, runner, used)
            except SchedulerError:
                self.config = before
                self._start_runner(None, runner, used)
                raise

    def resize_budget(self, budget: int | float | str) -> int:
        """Changes, while the session lives, how many experts a lossy policy with a memory budget keeps.

        budget: a number of experts over all layers, a share, or a size. Returns the number of experts. Raises
        ModelError where no lossy policy runs, BudgetError or PolicyError for what cannot be.
        """
        with self._lock:
            runner = self._ready()
            if runner.lossy is None:
                raise ModelError("nothing lossy runs here: set scheduler.lossy to swapmoe or emoe to have a budget")
            n_experts = sum(layer.num_experts for layer in self._layers)
            expert_bytes = max(layer.spec.record_bytes for layer in self._layers)
            kept = parse_amount(budget).to_experts(n_experts, expert_bytes, auto=self.n_slots)
            runner.lossy.policy.resize(kept)
            return kept

    def release(self, model: nn.Module) -> None:
        """No longer watches `model`, which was given to `finalize` or is a copy of that one."""
        self._tracker.forget(model)

    def close(self) -> None:
        """Stops the lanes and releases device memory; layers can no longer run. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._tracker.unbind()
            if self._runner is not None:
                planner = self._runner.planner
                if self._routing is not None and planner is not None and (learnt := planner.learnt()) is not None:
                    self._routing.save(learnt)
                self._runner.close()
            self._runner = None
            if self._finalizer is not None:
                self._finalizer()
            if self._store is not None:
                self._store.close()

    # Looking ----------------------------------------------------------------------------------------------------

    @property
    def store(self) -> ExpertStore:
        """The experts' bytes. Raises ModelError before `finalize`."""
        if self._store is None:
            raise ModelError("the session has no store yet; call finalize() first")
        return self._store

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What the session knows of each layer, in order."""
        return tuple(self._layers)

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """The open accelerators, in the order of their layers; empty without one."""
        return self._accelerators

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each accelerator with its layers; empty before the start."""
        return tuple(self._units)

    def planned_memory(self) -> list[PlannedMemory]:
        """What each accelerator holds for this session, and what it keeps free there, in bytes."""
        specs = {layer.spec for layer in self._layers if layer.placement != "cpu"}
        model = None if self._model is None else self._model()
        locked = self._store is None or self._store.is_locked
        return planned_memory(self._accelerators, specs, model, self.config.kv_reserve_bytes, locked=locked)

    @property
    def n_slots(self) -> int:
        """Slots of all accelerators, 0 without one."""
        return sum(device.n_slots for device in self._accelerators)

    @property
    def started(self) -> bool:
        """True while layers can run."""
        return self._runner is not None and not self._closed

    @property
    def lost(self) -> str | None:
        """What has become of an accelerator that hangs or has failed; None as long as all work."""
        return self._lost or lost_of(self._accelerators)

    @property
    def is_stuck(self) -> bool:
        """Whether an accelerator is lost without which the session cannot go on, or has not yet."""
        return not self._closed and lost_of(self._accelerators) is not None

    @property
    def planner(self) -> LayerPlanner | None:
        """The planner of the hybrid layers, None where every placement is fixed."""
        return None if self._runner is None else self._runner.planner

    @property
    def costs(self) -> Costs | None:
        """Predicted durations as corrected so far."""
        return None if self._runner is None else self._runner.costs

    @property
    def routing_recorder(self) -> RoutingRecorder | None:
        """Called with (layer, top_k_index [T, k], top_k_weights [T, k], predictions) at each layer call."""
        return None if self._runner is None else self._runner.routing_recorder

    @routing_recorder.setter
    def routing_recorder(self, recorder: RoutingRecorder | None) -> None:
        with self._lock:
            self._ready().routing_recorder = recorder

    def record_timeline(self, on: bool) -> None:
        """Starts recording (dropping an earlier recording), or stops it; experts then run one by one on each lane."""
        with self._lock:
            self._ready().trace(on)

    def record_run(self) -> None:
        """Starts a recording that `scheduler.recording.replay` follows exactly; slots start with the most used experts.

        Experts run one by one on each lane. Raises ModelError without an accelerator, or where a lossy policy runs.
        """
        with self._lock:
            runner = self._ready()
            if runner.planner is None or self.config.lossy is not None:
                raise ModelError(
                    "only plans can be recorded, and nothing is planned here: choose an accelerator (emulated, cuda:0) "
                    "with slots, and no lossy policy"
                )
            runner.drain()
            self._make_planner = Recorder
            self._start_runner(None, runner, runner.routing_counts if runner.routing_counts.any() else None)
            self._ready().trace(True)

    @property
    def recording(self) -> Recording:
        """What ran since `record_run`. Raises ModelError where nothing was recorded."""
        planner, tasks = self.planner, self.timeline
        if not isinstance(planner, Recorder):
            raise ModelError("nothing was recorded: call record_run() first")
        sizes = {layer.spec.record_bytes for layer in self._layers}
        return replace(planner.recording, tasks=tasks, expert_bytes=max(sizes))

    @property
    def timeline(self) -> list[TaskRecord]:
        """What ran while recording, by start time; waits for transfers under way. Kept after recording stops."""
        with self._lock:
            runner = self._ready()
            runner.drain()
            return sorted(runner.timeline, key=lambda record: (record.start_us, record.end_us))

    @property
    def plans(self) -> list[PlannedLayer]:
        """The plans and demands of the recorded layer calls, in order."""
        return list(self._ready().plans)

    @property
    def expert_uses(self) -> npt.NDArray[np.float64] | None:
        """float64 [layers, experts]: calls in which each expert was active; None where they are not told apart, because
        nothing is planned."""
        runner = self._runner
        return None if runner is None or runner.planner is None else runner.routing_counts.copy()

    def slot_contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) of what the slots hold or are being filled with."""
        with self._lock:
            return self._ready().slot_contents()

    @property
    def plain(self) -> bool:
        """Whether layer calls are exact, on the CPU alone and watched by nobody: a compiled step may stand for them."""
        runner = self._runner
        return (
            runner is not None
            and runner.planner is None
            and runner.routing_recorder is None
            and not runner.experts.tracing
            and runner.lossy is None
            and self._sink is None
            and not self._closed
        )

    def make_room(self, error: torch.OutOfMemoryError) -> None:
        """After work for which the accelerator had no memory left: fewer slots, with a warning.

        Raises BudgetError where there are none to give up.
        """
        with self._lock:
            n_slots = self.n_slots
            if not n_slots or self._runner is None or self._closed:
                reason = str(error).strip().partition("\n")[0]
                raise BudgetError(
                    f"the accelerator is out of memory, and there are no expert slots to give up ({reason}). Shorten"
                    " the prompt, lower memory.kv, or end other programs on the device"
                ) from error
            fewer = n_slots * SLOTS_KEPT_PERCENT // 100
            warnings.warn(
                f"the accelerator is out of memory: {fewer} expert slots in place of {n_slots} from here on. Set"
                f" gpu_expert_slots to {fewer} or a larger kv budget to have the room from the start",
                RuntimeWarning,
                stacklevel=2,
            )
            self._recover(self._runner, fewer)

    def resident(self) -> ResidentExperts | None:
        """What computes layers without the host, where every expert has its slot on one accelerator and layer calls are
        exact and watched by nobody; the same object as long as that holds."""
        with self._lock:
            runner = self._runner
            if runner is None or not runner.consistent or runner.lossy is not None or self._closed:
                return None
            if runner.routing_recorder is not None or runner.experts.tracing or self._sink is not None:
                return None
            if self._resident is None or self._resident.runner is not runner:
                self._count_resident()
                self._resident = find_resident(runner, self._units)
            return self._resident

    def staged(self) -> StagedPrompts | None:
        """What streams prompts through some of the slots, where that is possible and layer calls are exact and watched
        by nobody; the same object as long as that holds."""
        with self._lock:
            runner = self._runner
            if runner is None or not runner.consistent or self._closed or self._sink is not None:
                return None
            if runner.routing_recorder is not None or runner.experts.tracing:
                return None
            if self._staged_of is not runner:
                self._staged_of, self._staged = runner, find_staged(runner, self._units)
            return self._staged

    def exchanged(self) -> ExchangedExperts | None:
        """What carries calls of layers between a recorded step and the host, where one torch device has the slots and
        layer calls are exact and watched by nobody; the same object as long as that holds."""
        with self._lock:
            if self._runner is None or self._closed or self._sink is not None:
                return None
            runner = self._ready()
            if runner.lossy is not None or runner.routing_recorder is not None or runner.experts.tracing:
                return None
            if self._exchanged is None or self._exchanged.runner is not runner:
                self._exchanged = find_exchanged(runner, self._units)
            return self._exchanged

    def add_reporter(self, report: Callable[[StatsRecorder], None]) -> None:
        """`report` is called before counters are read or reset, to add what ran without layer calls."""
        self._reporters.append(report)

    def remove_reporter(self, report: Callable[[StatsRecorder], None]) -> None:
        """Takes back `add_reporter`."""
        self._reporters.remove(report)

    def stats(self) -> SessionStats:
        """A snapshot of the counters."""
        with self._lock:
            for report in self._reporters:
                report(self._stats)
            self._report_prompts()
            runner = self._runner
            if runner is not None and runner.consistent and not self._closed:
                runner.report()
            found = snapshot(self.config, self._layers, self._stats, self._store, self._units, runner, self._low)
            return replace(found, lost=self.lost)

    def reset_stats(self) -> None:
        """Sets all counters to zero."""
        with self._lock:
            if self._runner is not None and self._runner.consistent:
                self._runner.report()
            for report in self._reporters:
                report(self._stats)
            self._report_prompts()
            self._stats.reset()

    def forget_trial(self) -> None:
        """After a trial run: counters are zero, and the next call begins a first step."""
        self.reset_stats()
        self._tracker.restart()

    def describe_layer(self, layer: int) -> str:
        """One line for `print(model)`."""
        item = self._layers[layer]
        spec = item.spec
        return f"{item.num_experts} x [{spec.hidden} -> {spec.inter} -> {spec.hidden}], {spec.dtype}, {item.placement}"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Inside -----------------------------------------------------------------------------------------------------

    def _ready(self) -> ExpertsCall:
        """The runner, recovered if the last call did not end. Raises ModelError before start and after close."""
        if self._closed:
            raise ModelError("the session is closed: restore() the model, or inject it again")
        if self._runner is None:
            raise ModelError("the session has not started: weights are missing (load them, then call start())")
        if not self._runner.consistent:
            self._recover(self._runner)
        self._runner.settle()
        return self._runner

    def _report_prompts(self) -> None:
        """Counts the calls that a device has computed by itself."""
        self._count_resident()
        self._tell_of_prompts()

    def _count_resident(self) -> None:
        if self._resident is not None and self._lost is None:
            self._resident.report(self._stats)

    def _tell_of_prompts(self) -> None:
        """Tells the planner of the calls that it has not planned, before it plans the next one."""
        if self._staged is not None and self._staged.untold and self._lost is None:
            self._staged.report(self._stats)

    def _recover(self, broken: ExpertsCall, n_slots: int | None = None) -> None:
        """After a failed or interrupted call: waits for the lanes, forgets the slots, keeps costs and counters.

        `n_slots`: how many there are from here on; None: as many as before.
        """
        for device in self._accelerators:
            device.synchronize()
        broken.release()
        self._stats.failures += 1
        self._stats.forget_slots()
        self._tracker.restart()
        self._start_runner(n_slots, broken, None)

    def _go_on_after(self, error: Exception, hidden: torch.Tensor) -> None:
        """After an error of an accelerator in a call with these hidden states: with fewer slots if it was out of
        memory, else without it."""
        if isinstance(error, torch.OutOfMemoryError):
            self.make_room(error)
        else:
            self._go_on_without(as_lost(error, self._accelerators), hidden)

    def _go_on_without(self, error: LostError, hidden: torch.Tensor) -> None:
        """After the loss of an accelerator: the CPU computes all experts from here on, with a warning. Raises LostError
        where it cannot compute a call with these hidden states."""
        runner = self._runner
        if runner is None or not self._accelerators:
            raise error
        self._lost = str(error)
        if ending := why_it_ends(self.config, self.store, hidden):
            raise LostError(f"{error}. {ending}") from error
        go_on_without(error, self._accelerators, runner)
        self._accelerators, self._units, self._resident, self._exchanged = (), [], None, None
        self._staged = self._staged_of = None
        self._stats.failures += 1
        self._stats.forget_slots()
        self._tracker.restart()
        self._start_runner(None, runner, None)

    def _start_runner(
        self, setting: int | float | str | None, previous: ExpertsCall | None, frequencies: Frequencies | None
    ) -> None:
        """Replaces the runner; `setting` None keeps the slots, `previous` hands over costs, hooks and records."""
        if previous is not None:
            bring_back(self.store, previous)  # what is copied into slots now
        startup = self._startup()
        if self._routing is not None and previous is None:
            startup.learnt = self._routing.read()
        lossy = self.config.lossy
        if lossy is None:
            self._runner = startup.call(setting, previous, frequencies)
            if self.config.host_copy == "drop":
                drop(self.store, self._runner)
            return
        if lossy.low is not None and self._low is None:
            self._low = self._make_low_copy(lossy.low.low_dtype)
        self._runner = lossy_call(startup, lossy, self._low, setting, previous, frequencies)

    def _startup(self) -> Startup:
        model = None if self._model is None else self._model()
        return Startup(
            self.config, self._layers, self.store, self._units, model, self._probe, self._stats, self._tracker,
            make_planner=self._make_planner,
        )  # fmt: skip

    def _make_low_copy(self, dtype: Any) -> LowCopy:
        threads = cpu_threads(self.config, self._accelerators)
        return make_low_copy(self._layers, self.store, dtype, self._accelerators, self.config.backend, threads)

    def _new_stats(self) -> StatsRecorder:
        lossy, sizes = self.config.lossy, (len(self._layers), max(layer.num_experts for layer in self._layers))
        return StatsRecorder(*sizes, StatsRecorder(*sizes) if lossy is not None and lossy.low is not None else None)

    def _probe(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The routing that `block` would give for hidden [T, H]; its experts are not run."""
        self._sink = ProbeSink()
        try:
            return run_probe(block, hidden, self._sink)
        finally:
            self._sink = None

"""What a planner was told and what it answered, call by call: enough to drive another planner to the same plans.

``Recorder`` writes this down while a planner works. A ``Recording`` adds the tasks that really ran (``TaskRecord``) and
is saved as gzip JSON; float64 values survive that exactly. ``scheduler.recording.replay`` reads it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand, DemandView, LayerDemand, Phase, Prediction
from scheduler.errors import SchedulerError
from scheduler.forecast.use_model import Learnt
from scheduler.future import Future
from scheduler.graph import PlannedLayer
from scheduler.host import HostView
from scheduler.machine.costs import CostModel
from scheduler.plan import (
    Event,
    LaneState,
    LayerEnded,
    LayerPlan,
    ObservedTask,
    Transfer,
    TransferEnded,
)
from scheduler.planner.plan_view import PlanView
from scheduler.planner.planner import NOW
from scheduler.planner.protocol import Costs, LayerPlanner
from scheduler.planner.setup import PlannerSetup
from scheduler.records import TaskRecord
from scheduler.slots import SlotTable

FORMAT, VERSION = "hybrimoe recording", 3


class RecordingError(SchedulerError):
    """A recording cannot be read; the message says what was expected and found."""


class Call(NamedTuple):
    """One call of a planner's method: its name, the arguments, and (``warm_up``, ``plan_layer``) its answer.

    ``hits``: activated experts of ``plan_layer`` whose bytes were in a slot before.
    """

    name: str
    args: tuple[Any, ...]
    answer: Any = None
    hits: int = 0


@dataclass(slots=True)
class Recording:
    """``setup``: the planner's (``PlannerSetup.as_mapping``); ``calls`` in order; ``tasks``: what ran, by start time;
    ``facts``: model, versions, machine, free text for people."""

    setup: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    expert_bytes: int = 0

    @property
    def plans(self) -> list[PlannedLayer]:
        """The recorded plans with their demands, in order."""
        return [PlannedLayer(call.answer, call.args[0]) for call in self.calls if call.name == "plan_layer"]

    def planner(self) -> LayerPlanner:
        """A planner as the recorded one was at its start. Raises SchedulerError where the setup cannot be."""
        try:
            setup = PlannerSetup.from_mapping(self.setup)
        except (KeyError, TypeError) as error:
            raise RecordingError(f"the recording's setup is damaged: {type(error).__name__} {error}") from error
        return setup.planner()

    def save(self, path: Path) -> None:
        """Writes the file. Raises OSError."""
        body = {
            "format": FORMAT, "version": VERSION, "setup": self.setup, "facts": self.facts,
            "expert_bytes": self.expert_bytes, "calls": [_encode(call) for call in self.calls],
            "tasks": [list(asdict(task).values()) for task in self.tasks],
        }  # fmt: skip
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(body, file, default=_plain)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Reads a file. Raises RecordingError for what is no recording, OSError where it cannot be opened."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                body = json.load(file)
        except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise RecordingError(f"{path} is no recording of a run (gzip JSON of `trace capture`): {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise RecordingError(f"{path}: expected a file of `hybrimoe trace capture`, found something else")
        if body.get("version") != VERSION:
            raise RecordingError(f"{path}: version {body.get('version')!r}, this program reads {VERSION}; record again")
        try:
            return cls(
                dict(body["setup"]), [_decode(entry) for entry in body["calls"]],
                [TaskRecord(*values) for values in body["tasks"]], dict(body["facts"]), int(body["expert_bytes"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RecordingError(f"{path} is damaged: {type(error).__name__} {error}") from error


class Recorder:
    """A planner that passes everything on to another one and keeps what that is told and answers, in ``recording``."""

    def __init__(self, setup: PlannerSetup) -> None:
        self.recording = Recording(setup.as_mapping())
        self.planner = setup.planner()

    @property
    def n_layers(self) -> int:
        """As ``Planner.n_layers``."""
        return self.planner.n_layers

    @property
    def n_experts(self) -> int:
        """As ``Planner.n_experts``."""
        return self.planner.n_experts

    @property
    def costs(self) -> Costs:
        """As ``Planner.costs``."""
        return self.planner.costs

    @property
    def cost_models(self) -> tuple[CostModel, ...]:
        """As ``Planner.cost_models``."""
        return self.planner.cost_models

    @property
    def layers_ahead(self) -> int:
        """As ``Planner.layers_ahead``."""
        return self.planner.layers_ahead

    @property
    def layers_skipped(self) -> int:
        """As ``Planner.layers_skipped``."""
        return self.planner.layers_skipped

    @property
    def all_cached(self) -> bool:
        """As ``Planner.all_cached``."""
        return self.planner.all_cached

    def table(self, layer: int) -> tuple[SlotTable, int]:
        """As ``Planner.table``."""
        return self.planner.table(layer)

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """As ``Planner.resident_mask``."""
        return self.planner.resident_mask(layer)

    def contents(self) -> dict[int, tuple[int, int]]:
        """As ``Planner.contents``."""
        return self.planner.contents()

    def warm_up(self, frequencies: npt.ArrayLike | None = None) -> tuple[Transfer, ...]:
        """As ``Planner.warm_up``."""
        known = None if frequencies is None else np.array(frequencies, np.float64)  # a copy: counts go on
        transfers = self.planner.warm_up(frequencies)
        self._note("warm_up", (known,), transfers)
        return transfers

    def learnt(self) -> Learnt | None:
        """As ``Planner.learnt``."""
        return self.planner.learnt()

    def recall(self, learnt: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Recalls nothing: a replay begins with what the recording says, and that does not hold what was learnt."""
        return False

    def begin_sequence(self, future: Future | None = None) -> None:
        """As ``Planner.begin_sequence``."""
        self.planner.begin_sequence(future)
        self._note("begin_sequence", ())

    def begin_step(self, phase: Phase, n_tokens: int) -> None:
        """As ``Planner.begin_step``."""
        self.planner.begin_step(phase, n_tokens)
        self._note("begin_step", (phase, n_tokens))

    def plan_layer(self, demand: LayerDemand, lanes: LaneState = NOW, host: HostView | None = None) -> LayerPlan:
        """As ``Planner.plan_layer``."""
        return self.decide(demand, lanes.cpu_ready_us, lanes.accel_ready_us, lanes.link_ready_us, host).plan(demand)

    def decide(
        self, demand: Demand, cpu_ready_us: float = 0.0, accel_ready_us: float = 0.0, link_ready_us: float = 0.0,
        host: HostView | None = None,
    ) -> PlanView:  # fmt: skip
        """As ``Planner.decide``; noted as a call of ``plan_layer``."""
        hits = resident_hits(self.planner, demand)
        told = demand.frozen() if isinstance(demand, DemandView) else demand
        view = self.planner.decide(demand, cpu_ready_us, accel_ready_us, link_ready_us, host)
        lanes = LaneState(cpu_ready_us, accel_ready_us, link_ready_us)
        given = (told, lanes) if host is None else (told, lanes, host.copied())
        self._note("plan_layer", given, view.plan(demand), hits)
        return view

    def on_event(self, event: Event) -> None:
        """As ``Planner.on_event``."""
        self.planner.on_event(event)
        self._note("on_event", (event,))

    def end_transfer(self, layer: int, expert: int, slot: int, us: float = 0.0) -> None:
        """As ``Planner.end_transfer``; noted as its event."""
        self.on_event(TransferEnded(layer, expert, slot, us))

    def end_layer(self, layer: int, observed: Sequence[ObservedTask] = ()) -> None:
        """As ``Planner.end_layer``; noted as its event."""
        self.on_event(LayerEnded(layer, tuple(observed)))

    def observe(self, task: ObservedTask) -> None:
        """As ``Planner.observe``."""
        self.planner.observe(task)
        self._note("observe", (task,))

    def _note(self, name: str, args: tuple[Any, ...], answer: Any = None, hits: int = 0) -> None:
        self.recording.calls.append(Call(name, args, answer, hits))


def resident_hits(planner: LayerPlanner, demand: Demand) -> int:
    """Activated experts whose bytes are in a slot now."""
    return int(planner.resident_mask(demand.layer)[demand.expert_ids].sum())


def _encode(call: Call) -> list[Any]:
    args = [
        _plain(arg) if isinstance(arg, np.ndarray) or hasattr(arg, "__dataclass_fields__") else arg for arg in call.args
    ]
    if call.name == "on_event":
        args.append(type(call.args[0]).__name__)
    return [call.name, args, _plain(call.answer), call.hits]


def _plain(value: Any) -> Any:
    """JSON-ready data of arrays, numpy numbers and (tuples of) dataclasses."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _decode(entry: Any) -> Call:
    name, args, answer, hits = entry
    if name == "plan_layer":
        return Call(name, (_demand(args[0]), LaneState(**args[1]), *map(_host, args[2:])), _plan(answer), int(hits))
    if name == "warm_up":
        known = None if args[0] is None else np.array(args[0], np.float64)
        return Call(name, (known,), tuple(_transfer(item) for item in answer))
    if name == "on_event":
        return Call(name, (_event(*args),))
    if name == "observe":
        return Call(name, (ObservedTask(**args[0]),))
    if name in ("begin_sequence", "begin_step"):
        return Call(name, tuple(args))
    raise RecordingError(f"unknown call {name!r}")


def _event(body: Mapping[str, Any], kind: str) -> Event:
    if kind == "TransferEnded":
        return TransferEnded(**body)
    return LayerEnded(body["layer"], tuple(ObservedTask(**task) for task in body["observed"]))


def _demand(body: Mapping[str, Any]) -> LayerDemand:
    ahead = tuple(
        Prediction(
            item["layer"], np.array(item["expert_ids"], np.int32), np.array(item["n_tokens"], np.float32),
            np.array(item["scores"], np.float32),
        )
        for item in body["predictions"]
    )  # fmt: skip
    return LayerDemand(
        body["layer"], body["phase"], body["n_tokens_total"], np.array(body["expert_ids"], np.int32),
        np.array(body["n_tokens"], np.int32), np.array(body["gate_scores"], np.float32), ahead,
    )  # fmt: skip


def _host(body: Mapping[str, Any]) -> HostView:
    return HostView(np.array(body["waits_us"], np.float64), np.array(body["held"], np.bool_), _pairs(body["reads"]))


def _pairs(pairs: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(expert)) for layer, expert in pairs)


def _transfer(body: Mapping[str, Any]) -> Transfer:
    return Transfer(**{**body, "evicts": None if body["evicts"] is None else tuple(body["evicts"])})


def _plan(body: Mapping[str, Any]) -> LayerPlan:
    moves = {name: tuple(_transfer(item) for item in body[name]) for name in ("transfers", "prefetches")}
    experts = {name: tuple(body[name]) for name in ("cpu", "accel", "accel_slots", "awaited")}
    return LayerPlan(**{**body, **experts, **moves, "reads": _pairs(body.get("reads", ()))})

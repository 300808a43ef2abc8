"""Pure decision core: costs, balance, cache and prefetch policies, planner, task graph, simulator, traces.

State and events in, plans out: no torch, no clock, no threads, no environment. Names load on first use, so that
importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler.balancing import BALANCE_POLICIES, BalancePlan, LayerCosts, balance, evaluate
    from scheduler.demand import LayerDemand, Phase, Prediction
    from scheduler.errors import CostError, DemandError, PolicyError, ProfileError, SchedulerError, SlotError
    from scheduler.future import Future
    from scheduler.graph import GraphError, PlannedLayer, TaskGraph, chrome_trace
    from scheduler.machine.costs import CostModel
    from scheduler.machine.profile import HardwareProfile, ModelShape
    from scheduler.plan import Event, LaneState, LayerEnded, LayerPlan, ObservedTask, Transfer, TransferEnded
    from scheduler.planner.planner import Planner
    from scheduler.planner.policies import POLICIES, Policy, resolve_policy
    from scheduler.records import TaskRecord
    from scheduler.simulator.simulator import PhaseResult, SimulationConfig, Simulator
    from scheduler.slots import SlotState, SlotTable
    from scheduler.traces.trace import Trace, TraceError

_HOMES = {
    "balancing": ("LayerCosts", "BalancePlan", "balance", "evaluate", "BALANCE_POLICIES"),
    "machine.costs": ("CostModel",),
    "demand": ("Phase", "LayerDemand", "Prediction"),
    "errors": ("SchedulerError", "CostError", "DemandError", "SlotError", "ProfileError", "PolicyError"),
    "future": ("Future",),
    "graph": ("GraphError", "PlannedLayer", "TaskGraph", "chrome_trace"),
    "plan": ("LaneState", "Transfer", "LayerPlan", "ObservedTask", "TransferEnded", "LayerEnded", "Event"),
    "planner.planner": ("Planner",),
    "planner.policies": ("Policy", "resolve_policy", "POLICIES"),
    "machine.profile": ("HardwareProfile", "ModelShape"),
    "records": ("TaskRecord",),
    "simulator.simulator": ("PhaseResult", "SimulationConfig", "Simulator"),
    "traces.trace": ("Trace", "TraceError"),
    "slots": ("SlotState", "SlotTable"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BALANCE_POLICIES",
    "POLICIES",
    "BalancePlan",
    "CostError",
    "CostModel",
    "DemandError",
    "Event",
    "Future",
    "GraphError",
    "HardwareProfile",
    "LaneState",
    "LayerCosts",
    "LayerDemand",
    "LayerEnded",
    "LayerPlan",
    "ModelShape",
    "ObservedTask",
    "Phase",
    "PhaseResult",
    "PlannedLayer",
    "Planner",
    "Policy",
    "PolicyError",
    "Prediction",
    "ProfileError",
    "SchedulerError",
    "SimulationConfig",
    "Simulator",
    "SlotError",
    "SlotState",
    "SlotTable",
    "TaskGraph",
    "TaskRecord",
    "Trace",
    "TraceError",
    "Transfer",
    "TransferEnded",
    "balance",
    "chrome_trace",
    "evaluate",
    "resolve_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

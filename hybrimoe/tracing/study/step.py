"""One step explained: decisions, critical path, idle lanes, and what more of a resource would bring."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hybrimoe.errors import ConfigError
from hybrimoe.extensions.policies import open_policy
from hybrimoe.machine.profiles import open_hardware, with_accelerators
from hybrimoe.tracing.sources import open_trace, split
from scheduler.graph import TaskGraph
from scheduler.records import TaskRecord
from scheduler.simulator.run import simulator_class
from scheduler.simulator.simulator import Simulator
from scheduler.simulator.what_if import us_with_a_slot, us_with_machine
from scheduler.traces.analysis import expert_frequencies
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import predictions_for


@dataclass(frozen=True, slots=True)
class StepReport:
    """Plain data of a step and its simulated execution."""

    facts: dict[str, Any]
    records: list[TaskRecord]


def explain_step(
    trace: str | None, hardware: str, shape: str | None, policy: str, cache_ratio: float, step: int, seed: int = 0,
    accelerators: int | None = None, host_ratio: float = 1.0,
) -> StepReport:  # fmt: skip
    """Simulate up to ``step`` and explain it. ``phase`` of the step is whatever the trace has there.

    host_ratio: the share of all experts that host memory holds.
    """
    if step < 0:
        raise ConfigError(f"--step counts from 0, found {step}")
    found = open_trace(trace, shape, seed=seed)
    calibration, evaluation = split(found.trace)
    source = DemandSource(evaluation, predictions_for(evaluation, "auto", calibration, seed))
    known = expert_frequencies(calibration)
    profile = with_accelerators(open_hardware(hardware), accelerators, shared_link=False)
    config = open_policy(policy).simulated(cache_ratio=cache_ratio, host_ratio=host_ratio)

    run = simulator_class(profile, config)(
        evaluation, profile, found.shape, config, frequencies=known, source=source, earlier=DemandSource(calibration)
    )
    run.advance_to(step)
    frozen = run.snapshot()
    latency_us = run.step_us(step, explained=True)
    graph = TaskGraph.from_plans(run.layers, run.engine.costs, run.engine.expert_bytes)
    facts = {
        "model_shape": found.shape.name,
        "hardware": profile.name,
        "policy": policy,
        "cache_ratio": cache_ratio,
        "host_ratio": host_ratio,
        "step": step,
        "phase": run.steps[step].phase,
        "tokens": run.steps[step].n_tokens,
        "latency_us": latency_us,
        "layers": [asdict(explanation) for explanation in run.explanations],
        "critical_path_us": critical_path_us(graph),
        "idle_us": graph.idle_us(),
        "graph_makespan_us": graph.makespan_us,
        "would_bring_us": _what_if(frozen, run, step, latency_us),
        "kind": "simulated",
        "notes": list(found.notes),
    }
    return StepReport(facts, run.records)


def critical_path_us(graph: TaskGraph) -> dict[str, float]:
    """Time on the critical path by kind of task, longest first."""
    total: dict[str, float] = {}
    for task in graph.critical_path():
        total[task.kind] = total.get(task.kind, 0.0) + task.duration_us
    return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))


def _what_if(frozen: Simulator, run: Simulator, step: int, latency_us: float) -> dict[str, float]:
    """us saved on this step by one more unit of each resource; ``frozen``: as it was before the step."""
    profile, shape = frozen.profile, frozen.shape
    cpu, accel, link = profile.cpu, profile.accel, profile.link
    machines = {
        "one more GB/s of CPU reads": replace(profile, cpu=replace(cpu, read_gbps=cpu.read_gbps + 1)),
        "one more GB/s of link": replace(profile, link=replace(link, gbps=link.gbps + 1)),
        "ten more GB/s of device memory": replace(profile, accel=replace(accel, mem_gbps=accel.mem_gbps + 10)),
    }
    if run.engine.host is not None and profile.disk is not None:
        faster = replace(profile.disk, gbps=profile.disk.gbps + 1)
        machines["one more GB/s of disk"] = replace(profile, disk=faster)
    plans = [item.plan for item in run.layers]
    found = {name: us_with_machine(frozen, step, plans, machine) for name, machine in machines.items()}
    if frozen.n_slots < shape.n_layers * shape.n_experts:
        found["one more slot"] = us_with_a_slot(frozen, step, run.explanations)
    return {name: max(latency_us - us, 0.0) for name, us in found.items()}

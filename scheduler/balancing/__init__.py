"""Intra-layer load balance: which activated experts run on the CPU, which on the accelerator, what is transferred.

``balance(costs, policy)`` is the public door; the planner calls the same compiled kernels through ``kernel_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.balancing import optimal as _optimal
from scheduler.balancing import peers as _peers
from scheduler.balancing import valued as _valued
from scheduler.balancing.contract import Assignment, BalanceFunction, FunctionKernel, evaluate
from scheduler.balancing.problem import (
    ACCEL,
    COUNT,
    CPU,
    PRIORITY,
    TRANSFER,
    BalancePlan,
    LayerCosts,
    new_plan,
)
from scheduler.balancing.timeline import keep_in_slots, plan_makespan
from scheduler.errors import CostError, PolicyError, did_you_mean
from scheduler.parameters import Parameter, Within, check_values

Kernel = Callable[[Any, Any, Any, Any], tuple[float, float]]

CPU_ONLY, ACCEL_ONLY, VALUE = "cpu_only", "accel_only", "value"
_DEFAULTS: Final = np.array([-1.0, 0.0])


@dataclass(frozen=True, slots=True)
class _Entry:
    """A policy: a compiled kernel or a Python function, and its parameters."""

    kernel: Kernel | None = None
    parameters: tuple[Parameter, ...] = ()
    function: BalanceFunction | None = None


_NODE_LIMIT = Parameter("node_limit", (int,), None, Within(low=0), optional=True)
_HOT = Parameter("hot", (int,), None, Within(low=0), optional=True)
_FORM = Parameter("form", (str,), "sum", choices=("sum", "max"))
_LINK_PRICE = Parameter("link_price", (float,), 0.0, Within(0.0, 1e9))
_CPU_RATE = Parameter("cpu_rate", (float,), 1.0, Within(1e-3, 1.0))

_POLICIES: dict[str, _Entry] = {
    "optimal": _Entry(_optimal.optimal, (_NODE_LIMIT,)),
    "hybrimoe": _Entry(_peers.hybrimoe),
    "hybrimoe_released": _Entry(_peers.hybrimoe_released),
    "static": _Entry(_peers.static_mapping),
    "on_demand": _Entry(_peers.on_demand),
    "layers": _Entry(_peers.whole_layers),
    "fiddler": _Entry(_peers.fiddler, (_FORM,)),
    "monde": _Entry(_peers.monde, (_HOT,)),
    "bandwidth": _Entry(_peers.bandwidth),
    CPU_ONLY: _Entry(_peers.cpu_only),
    ACCEL_ONLY: _Entry(_peers.on_demand),
    VALUE: _Entry(_valued.value, (_LINK_PRICE, _CPU_RATE)),
}

BALANCE_POLICIES: tuple[str, ...] = tuple(_POLICIES)
"""Those that are in the package; ``add_balance`` adds others."""


def add_balance(name: str, function: BalanceFunction, parameters: Mapping[str, Parameter]) -> None:
    """Makes a function a balance policy of that name, in place of an earlier function of it.

    Raises PolicyError for the name of one of BALANCE_POLICIES.
    """
    if name in BALANCE_POLICIES:
        raise PolicyError(f"balance {name!r} is one of HybriMoE's own; choose another name")
    _POLICIES[name] = _Entry(None, tuple(parameters.values()), function)


def balance_names() -> tuple[str, ...]:
    """All balance policies there are now."""
    return tuple(_POLICIES)


def balance(
    costs: LayerCosts, policy: str = "optimal", *, priority: npt.ArrayLike | None = None, **params: Any
) -> BalancePlan:
    """Plans one layer.

    policy: one of ``balance_names``. params: ``node_limit`` (optimal: search nodes, None = automatic), ``form``
    (fiddler: "sum" or "max"), ``hot`` (monde: number of hot experts, None = by bandwidth ratio), ``link_price``
    and ``cpu_rate`` (value: us that a transfer must earn beside its makespan; CPU's share of its rate while the link
    works). ``priority`` (bandwidth: the highest are fetched first; value: worth in us of residency): default 0.
    Raises PolicyError for an unknown policy or parameter, CostError for costs that cannot be.
    """
    if not isinstance(costs, LayerCosts):
        raise CostError(f"balance expects LayerCosts, found {type(costs).__name__}")
    kernel, numbers = kernel_of(policy, **params)
    n = costs.table.shape[1]
    if priority is not None:
        values = np.asarray(priority, np.float64)
        if values.shape != (n,) or not np.all(np.isfinite(values)):
            raise CostError(f"priority: expected {n} finite numbers, found shape {values.shape}")
        costs.table[PRIORITY] = values
    plan = new_plan(n)
    makespan_us, bound_us = kernel(costs.table, costs.ready, numbers, plan)
    if keep_in_slots(costs.table, plan):
        makespan_us = plan_makespan(costs.table, costs.ready, plan)
    cpu, accel, transfers = (tuple(plan[row, : plan[row, COUNT]].tolist()) for row in (CPU, ACCEL, TRANSFER))
    return BalancePlan(cpu, accel, transfers, float(makespan_us), float(bound_us))


def kernel_of(policy: str, **params: Any) -> tuple[Kernel, npt.NDArray[np.float64]]:
    """The kernel of a policy and its parameter vector float64[2]. Raises PolicyError."""
    found = _POLICIES.get(policy)
    if found is None:
        raise PolicyError(f"unknown balance policy {policy!r}{did_you_mean(str(policy), _POLICIES)}")
    values = check_values(f"balance {policy}", parameters_of_balance(policy), params)
    if found.function is not None:
        return FunctionKernel(policy, found.function, values), _DEFAULTS
    assert found.kernel is not None
    if policy == VALUE:
        return found.kernel, np.array([values.get("link_price", 0.0), values.get("cpu_rate", 1.0)])
    kernel = _optimal.fiddler_max if values.get("form") == "max" else found.kernel
    number = values.get("node_limit", values.get("hot"))
    return kernel, _DEFAULTS if number is None else np.array([float(number), 0.0])


def parameters_of_balance(policy: str) -> dict[str, Parameter]:
    """A balance policy's parameters by name."""
    return {parameter.name: parameter for parameter in _POLICIES[policy].parameters}


__all__ = [
    "ACCEL_ONLY",
    "BALANCE_POLICIES",
    "CPU_ONLY",
    "VALUE",
    "Assignment",
    "BalanceFunction",
    "BalancePlan",
    "Kernel",
    "LayerCosts",
    "add_balance",
    "balance",
    "balance_names",
    "evaluate",
    "kernel_of",
    "parameters_of_balance",
]

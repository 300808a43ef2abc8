"""Intra-layer load balance: which activated experts run on the CPU, which on the accelerator, what is transferred.

``balance(costs, policy)`` is the public door; the planner calls the same compiled kernels through ``kernel_of``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.balancing import optimal as _optimal
from scheduler.balancing import peers as _peers
from scheduler.balancing import valued as _valued
from scheduler.balancing.problem import (
    ACCEL,
    ARRIVAL,
    COUNT,
    CPU,
    PRIORITY,
    TRANSFER,
    BalancePlan,
    LayerCosts,
    new_plan,
)
from scheduler.balancing.timeline import plan_makespan
from scheduler.errors import CostError, PolicyError, did_you_mean

Kernel = Callable[[Any, Any, Any, Any], tuple[float, float]]

_KERNELS: dict[str, tuple[Kernel, frozenset[str]]] = {
    "optimal": (_optimal.optimal, frozenset({"node_limit"})),
    "hybrimoe": (_peers.hybrimoe, frozenset()),
    "static": (_peers.static_mapping, frozenset()),
    "on_demand": (_peers.on_demand, frozenset()),
    "layers": (_peers.whole_layers, frozenset()),
    "fiddler": (_peers.fiddler, frozenset({"form"})),
    "monde": (_peers.monde, frozenset({"hot"})),
    "bandwidth": (_peers.bandwidth, frozenset()),
    "cpu_only": (_peers.cpu_only, frozenset()),
    "accel_only": (_peers.on_demand, frozenset()),
    "value": (_valued.value, frozenset({"link_price", "cpu_rate"})),
}
"""Policy name -> compiled kernel and the parameters it knows."""

BALANCE_POLICIES: tuple[str, ...] = tuple(_KERNELS)


def balance(
    costs: LayerCosts, policy: str = "optimal", *, priority: npt.ArrayLike | None = None, **params: Any
) -> BalancePlan:
    """Plans one layer.

    policy: one of BALANCE_POLICIES. params: ``node_limit`` (optimal: search nodes, None = automatic), ``form``
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
    cpu, accel, transfers = (tuple(plan[row, : plan[row, COUNT]].tolist()) for row in (CPU, ACCEL, TRANSFER))
    return BalancePlan(cpu, accel, transfers, float(makespan_us), float(bound_us))


_DEFAULTS = np.array([-1.0, 0.0])


def kernel_of(policy: str, **params: Any) -> tuple[Kernel, npt.NDArray[np.float64]]:
    """The compiled kernel of a policy and its parameter vector float64[2]. Raises PolicyError."""
    found = _KERNELS.get(policy)
    if found is None:
        raise PolicyError(f"unknown balance policy {policy!r}{did_you_mean(str(policy), _KERNELS)}")
    kernel, known = found
    if not params and policy != "value":
        return kernel, _DEFAULTS
    for name in params:
        if name not in known:
            raise PolicyError(f"balance {policy}: unknown parameter {name!r}{did_you_mean(name, known)}")
    if policy == "value":
        return kernel, _value_parameters(params)
    form = params.get("form", "sum")
    if form not in ("sum", "max"):
        raise PolicyError(f"balance fiddler: form must be 'sum' or 'max', found {form!r}")
    if form == "max":
        kernel = _optimal.fiddler_max
    number = params.get("node_limit", params.get("hot"))
    if number is None:
        return kernel, _DEFAULTS
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise PolicyError(f"balance {policy}: expected an integer of at least 0, found {number!r}")
    return kernel, np.array([float(number), 0.0])


def _value_parameters(params: dict[str, Any]) -> npt.NDArray[np.float64]:
    numbers = np.array([0.0, 1.0])
    for i, (name, low, high) in enumerate((("link_price", 0.0, 1e9), ("cpu_rate", 1e-3, 1.0))):
        given = params.get(name, numbers[i])
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not low <= given <= high:
            raise PolicyError(f"balance value: {name} must be a number in [{low}, {high}], found {given!r}")
        numbers[i] = given
    return numbers


def parameters_of_balance(policy: str) -> frozenset[str]:
    """Names of a balance policy's parameters."""
    return _KERNELS[policy][1]


def evaluate(costs: LayerCosts, cpu: tuple[int, ...], accel: tuple[int, ...], transfers: tuple[int, ...]) -> float:
    """Makespan in us of any plan under the contract's semantics. Raises CostError if it is no valid plan."""
    n = len(costs)
    if sorted((*cpu, *accel)) != list(range(n)):
        raise CostError(f"every one of the {n} experts must be placed once, found cpu {cpu} and accel {accel}")
    needed = {e for e in accel if costs.table[ARRIVAL, e] < 0}
    if sorted(transfers) != sorted(needed):
        raise CostError(f"transfers must be the accelerator's misses {sorted(needed)}, found {transfers}")
    plan = new_plan(n)
    for row, experts in ((CPU, cpu), (ACCEL, accel), (TRANSFER, transfers)):
        plan[row, COUNT] = len(experts)
        plan[row, : len(experts)] = experts
    return float(plan_makespan(costs.table, costs.ready, plan))


__all__ = [
    "BALANCE_POLICIES",
    "BalancePlan",
    "Kernel",
    "LayerCosts",
    "balance",
    "evaluate",
    "kernel_of",
    "parameters_of_balance",
]

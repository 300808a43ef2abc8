"""Policies of other authors: registered by one decorator, typed parameters, every breach of the contract named."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pytest

from scheduler.balancing import LayerCosts, balance
from scheduler.demand import LayerDemand, Prediction
from scheduler.errors import PolicyError
from scheduler.extension import Assignment, CachePolicy, PrefetchPolicy, Setting, Within, extensions, policy
from scheduler.machine.costs import CostModel
from scheduler.parameters import read_parameters
from scheduler.planner.planner import Planner
from scheduler.planner.policies import POLICIES, policy_parameters, resolve_policy

N_LAYERS, N_EXPERTS = 3, 4


class Sticky(CachePolicy):
    def __init__(
        self, setting: Setting, alpha: Annotated[float, Within(0.0, 1.0)] = 0.1, mode: Literal["a", "b"] = "a"
    ) -> None:
        super().__init__(setting)
        self.alpha = alpha


def all_cpu(costs: LayerCosts, spare: int = 0, broken: bool = False) -> Assignment:
    n = len(costs)
    if broken:
        return Assignment(list(range(n - 1)), [])
    return Assignment(list(range(spare, n)), list(range(spare)))


@pytest.fixture(scope="module", autouse=True)
def registered(policies_put_back):
    """Not when the module is imported, which is before any test."""
    policy("test_sticky", balance="static", prefetch="none")(Sticky)
    policy("test_all_cpu", cache="lru")(all_cpu)


def planner(name: str, n_slots: int = 4, **params: object) -> Planner:
    costs = CostModel.uniform(N_LAYERS, cpu_us=100.0, accel_us=10.0, transfer_us=20.0, dense_us=100.0)
    made = Planner(N_LAYERS, N_EXPERTS, n_slots, costs, name, **params)
    for transfer in made.warm_up():
        made.end_transfer(transfer.layer, transfer.expert, transfer.slot)
    made.begin_step("decode", 1)
    return made


def demand(layer: int, *ids: int) -> LayerDemand:
    ahead = tuple(
        Prediction(later, np.array([3], np.int32), np.ones(1, np.float32), np.ones(1, np.float32))
        for later in range(layer + 1, N_LAYERS)
    )
    ones = np.ones(len(ids), np.int32)
    return LayerDemand(layer, "decode", 1, np.array(ids, np.int32), ones, np.zeros(N_EXPERTS, np.float32), ahead)


def test_the_decorator_makes_a_part_and_a_preset():
    assert POLICIES["test_sticky"].name == "static/none/test_sticky"
    assert resolve_policy("hybrimoe/impact/test_sticky", alpha=1).params == {"alpha": 1.0}
    assert {"test_sticky", "test_all_cpu"} <= {entry.name for entry in extensions()}
    assert set(policy_parameters(POLICIES["test_sticky"])) == {"alpha", "mode"}
    assert planner("test_sticky", alpha=0.5).cache.alpha == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("test_sticky", {"alpha": 1.5}, r"alpha must be a float in \[0, 1\], found 1.5"),
        ("test_sticky", {"alpha": True}, "alpha must be a float"),
        ("test_sticky", {"alfa": 0.5}, "did you mean 'alpha'"),
        ("test_sticky", {"mode": "c"}, "mode must be 'a' or 'b', found 'c'"),
        ("test_all_cpu", {"spare": 0.5}, "spare must be an integer"),
    ],
)
def test_parameters_are_typed(name, params, message):
    with pytest.raises(PolicyError, match=message):
        resolve_policy(name, **params)


def test_a_balance_function_plans_as_the_compiled_ones_do():
    costs = LayerCosts([100.0, 100.0], [10.0, 10.0], [20.0, 20.0], [False, True])
    found = balance(costs, "test_all_cpu", spare=1)
    assert (found.cpu, found.accel, found.transfers, found.makespan_us) == ((1,), (0,), (0,), 100.0)
    plan = planner("test_all_cpu", spare=1).plan_layer(demand(0, 1, 2))
    assert (plan.cpu, plan.accel) == ((2,), (1,))


def test_a_plan_that_breaks_the_contract_is_named():
    with pytest.raises(PolicyError, match=r"balance test_all_cpu breaks the contract: every one of the 2.*cpu=\[0\]"):
        planner("test_all_cpu", broken=True).plan_layer(demand(0, 1, 2))


def broken_cache(**methods: object) -> str:
    """Registers a cache policy with these methods; its name."""
    policy("test_broken", balance="on_demand")(type("Broken", (CachePolicy,), {**methods, "__module__": __name__}))
    return "test_broken"


def broken_prefetch(answer: object) -> str:
    def propose(self, demand, limit):
        return answer

    policy("test_guess", balance="static")(
        type("Guess", (PrefetchPolicy,), {"propose": propose, "__module__": __name__})
    )
    return "test_guess"


def _nan(self, demand):
    self.keep[5] = np.nan


def _short(self, demand):
    self.keep = np.zeros(3)


def _greedy(self, frequencies):
    self.capacities = np.full(N_LAYERS, N_EXPERTS)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"observe": _nan}, "breaks the contract in _nan: keep is NaN for expert 1 of layer 1"),
        ({"observe": _short}, r"keep must be float64\[12\]"),
        ({"warmed": _greedy}, "more than the 4 slots"),
        ({"observe": lambda self, demand: 1 / 0}, "cache test_broken raised ZeroDivisionError"),
    ],
)
def test_a_broken_cache_is_named(methods, message):
    with pytest.raises(PolicyError, match=message):
        planner(broken_cache(**methods)).plan_layer(demand(0, 1, 2))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "must return two arrays"),
        ((np.array([1]), np.array([1.0])), "keys must be of later layers, 4..11"),
        ((np.array([7, 7]), np.array([1.0, 1.0])), "a key stands twice"),
        ((np.array([7]), np.array([np.nan])), "gains must be finite"),
        ((np.array([7]), np.array([1])), "gains floats"),
        ((np.array([4]), np.array([1.0])), r"keys \[4\] have a slot already"),
        ((np.arange(4, 4 + 9), np.ones(9)), "at most .* transfers fit"),
    ],
)
def test_broken_proposals_are_named(answer, message):
    with pytest.raises(PolicyError, match=f"prefetch test_guess breaks the contract at layer 0: .*{message}"):
        planner(broken_prefetch(answer)).plan_layer(demand(0, 1, 2))


def test_what_cannot_be_a_policy_is_refused():
    with pytest.raises(PolicyError, match="one of HybriMoE's own"):
        policy("lru")(Sticky)
    with pytest.raises(PolicyError, match="small letters"):
        policy("My Policy")(Sticky)
    with pytest.raises(PolicyError, match="has no place"):
        policy("test_double", cache="lru")(Sticky)
    with pytest.raises(PolicyError, match="found 3"):
        policy("test_number")(3)  # type: ignore[type-var]
    with pytest.raises(PolicyError, match="needs a default"):
        read_parameters("p", lambda costs, alpha: None)
    with pytest.raises(PolicyError, match="must have a type"):
        read_parameters("p", lambda costs, alpha=[]: None)

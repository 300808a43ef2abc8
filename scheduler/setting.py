"""What a policy may look at when it is made: the model, the slots, the costs; and helpers for parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from scheduler.demand import Demand
from scheduler.errors import PolicyError, did_you_mean
from scheduler.future import Future
from scheduler.machine.costs import CostModel
from scheduler.slots import SlotTable

Scorer = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Features float32[n, n_features] -> scores float32[n]; higher = sooner needed."""

Made = TypeVar("Made")


class Forecast(Protocol):
    """Expects use of experts; owned by the planner (``forecast.value_model.ValueModel``)."""

    def begin_sequence(self) -> None: ...

    def arrive(self, demand: Demand) -> bool: ...

    def follow(self, demand: Demand) -> None: ...


@dataclass(slots=True, eq=False)
class Setting:
    """Shared by the policies of one planner. ``step`` counts ``begin_step`` since the sequence began, from 0.
    ``forecast``: what a policy expects of the next layers and tokens, where one made it: the planner tells it of every
    demand before it asks the policies, so those that share it share what it was told.
    """

    n_layers: int
    n_experts: int
    slots: SlotTable
    costs: CostModel
    lookahead: int = 3
    future: Future | None = None
    scorer: Scorer | None = None
    prefetch_scorer: Scorer | None = None
    step: int = -1
    forecast: Forecast | None = None

    @property
    def n_keys(self) -> int:
        """Experts of the whole model; key = layer * n_experts + expert."""
        return self.n_layers * self.n_experts

    def need_future(self, policy: str) -> Future:
        """The recorded routing that an oracle reads. Raises PolicyError without one that fits."""
        if self.future is None:
            raise PolicyError(f"{policy} is an oracle: give the planner future=Future(...) of a recorded trace")
        if (self.future.n_layers, self.future.n_experts) != (self.n_layers, self.n_experts):
            raise PolicyError(
                f"{policy}: the future has {self.future.n_layers} x {self.future.n_experts} experts, "
                f"the planner {self.n_layers} x {self.n_experts}"
            )
        return self.future


def parameters_of(maker: Callable[..., Any]) -> frozenset[str]:
    """Names of a policy class's keyword parameters (everything after ``setting``)."""
    return frozenset(p for p in inspect.signature(maker).parameters if p not in ("self", "setting"))


def make(
    kind: str, name: str, makers: Mapping[str, Callable[..., Made]], setting: Setting, params: Mapping[str, Any]
) -> Made:
    """Builds the policy ``name`` with those of ``params`` that it knows. Raises PolicyError for an unknown name."""
    if name not in makers:
        raise PolicyError(f"unknown {kind} policy {name!r}{did_you_mean(name, makers)}")
    known = parameters_of(makers[name])
    return makers[name](setting, **{key: value for key, value in params.items() if key in known})


def number(policy: str, name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float within [low, high]; raises PolicyError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise PolicyError(f"{policy}: {name} must be a number in [{low}, {high}], found {value!r}")
    return float(value)


def integer(policy: str, name: str, value: Any, low: int) -> int:
    """``value`` as an integer of at least ``low``; raises PolicyError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise PolicyError(f"{policy}: {name} must be an integer of at least {low}, found {value!r}")
    return value


def flag(policy: str, name: str, value: Any) -> bool:
    """``value`` if it is true or false; raises PolicyError."""
    if not isinstance(value, bool):
        raise PolicyError(f"{policy}: {name} must be true or false, found {value!r}")
    return value


def choice(policy: str, name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """``value`` if it is allowed; raises PolicyError."""
    if value not in allowed:
        raise PolicyError(
            f"{policy}: {name} must be one of {allowed}, found {value!r}{did_you_mean(str(value), allowed)}"
        )
    return str(value)

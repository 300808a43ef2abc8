"""What a balance plan must be, whoever made it; and balance policies that are written as plain Python functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import ACCEL, ARRIVAL, COUNT, CPU, HOST, LINK, NEVER_US, TRANSFER, LayerCosts, new_plan
from scheduler.balancing.timeline import plan_makespan
from scheduler.errors import CostError, PolicyError, SchedulerError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a balance function answers: positions 0..n-1 of the layer's experts in execution order on each lane, and
    those that are transferred, in link order (None: the accelerator's misses, in accelerator order)."""

    cpu: Sequence[int]
    accel: Sequence[int]
    transfers: Sequence[int] | None = None


BalanceFunction = Callable[..., Assignment]
"""``(costs: LayerCosts, parameter=default, ...) -> Assignment``."""


def evaluate(costs: LayerCosts, cpu: Sequence[int], accel: Sequence[int], transfers: Sequence[int]) -> float:
    """Makespan in us of any plan under the contract's semantics. Raises CostError if it is no valid plan."""
    n = len(costs)
    if sorted((*cpu, *accel)) != list(range(n)):
        raise CostError(f"every one of the {n} experts must be placed once, found cpu {cpu} and accel {accel}")
    needed = {e for e in accel if costs.table[ARRIVAL, e] < 0}
    if sorted(transfers) != sorted(needed):
        raise CostError(f"transfers must be the accelerator's misses {sorted(needed)}, found {transfers}")
    if costs.table.shape[0] > HOST and any(costs.table[HOST, e] >= NEVER_US for e in cpu):
        raise CostError(f"experts without a copy in host memory stay on the accelerator, found cpu {cpu}")
    plan = new_plan(n)
    write(plan, cpu, accel, transfers)
    return float(plan_makespan(costs.table, costs.ready, plan))


def write(plan: npt.NDArray[np.int64], cpu: Sequence[int], accel: Sequence[int], transfers: Sequence[int]) -> None:
    """Puts the three lists into the rows of a plan."""
    for row, experts in ((CPU, cpu), (ACCEL, accel), (TRANSFER, transfers)):
        plan[row, COUNT] = len(experts)
        plan[row, : len(experts)] = experts


def _host_us(table: Floats) -> Floats | None:
    """``LayerCosts.host_us`` of a table."""
    return np.where(table[HOST] < NEVER_US, table[HOST], np.inf) if table.shape[0] > HOST else None


@dataclass(frozen=True, slots=True)
class FunctionKernel:
    """A balance function, called as the compiled kernels are; every answer is checked before it is used."""

    name: str
    function: BalanceFunction
    values: Mapping[str, Any]

    def __call__(
        self, table: Floats, ready: Floats, params: Floats, plan: npt.NDArray[np.int64]
    ) -> tuple[float, float]:
        """Writes the function's answer into ``plan``; (makespan in us, 0). Raises PolicyError for a wrong answer."""
        here = table[ARRIVAL] >= 0.0
        costs = LayerCosts(
            table[CPU].copy(), table[ACCEL].copy(), table[TRANSFER].copy(), here, float(ready[CPU]),
            float(ready[ACCEL]), float(ready[LINK]), np.maximum(table[ARRIVAL], 0.0), _host_us(table),
        )  # fmt: skip
        answer = self._ask(costs)
        try:
            cpu, accel = [int(e) for e in answer.cpu], [int(e) for e in answer.accel]
            misses = [e for e in accel if 0 <= e < here.size and not here[e]]
            transfers = misses if answer.transfers is None else [int(e) for e in answer.transfers]
            makespan_us = evaluate(costs, cpu, accel, transfers)
        except (CostError, TypeError, ValueError) as error:
            raise PolicyError(
                f"balance {self.name} breaks the contract: {error}; its plan: {answer}, made for cpu_us "
                f"{table[CPU].round(1).tolist()}, accel_us {table[ACCEL].round(1).tolist()}, resident {here.tolist()}"
            ) from error
        write(plan, cpu, accel, transfers)
        return makespan_us, 0.0

    def _ask(self, costs: LayerCosts) -> Assignment:
        try:
            answer = self.function(costs, **self.values)
        except SchedulerError:
            raise
        except Exception as error:  # another author's code: whatever it raises, it must be named
            raise PolicyError(f"balance {self.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(answer, Assignment):
            raise PolicyError(f"balance {self.name} must return an Assignment, found {answer!r}")
        return answer

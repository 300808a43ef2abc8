"""The intra-layer problem and its answer, as the public contract states them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.errors import CostError

Floats = npt.NDArray[np.float64]

CPU, ACCEL, TRANSFER, ARRIVAL, PRIORITY = range(5)
"""Rows of a cost table float64[5, n]. ARRIVAL is -1 for an expert that is not resident, else when it is there."""
LINK = TRANSFER
"""CPU, ACCEL and LINK also index ``ready`` float64[3], when each lane gets free, and name the rows of a plan."""
HOST = 5
"""A sixth row, of a table in which experts wait for the disk: us until each is in host memory, where CPU and link read
it; NEVER_US where it will not be. Tables without the row are of layers of which everything is there."""
NEVER_US = 1e15
COUNT = -1
"""Last column of a plan int64[3, n + 1]: how many of the row's n places are taken. The row CPU holds positions in the
order in which the CPU computes them, ACCEL in that of the accelerator, TRANSFER in that of the link."""
NOT_RESIDENT = -1.0


@dataclass(frozen=True, slots=True, eq=False)
class LayerCosts:
    """Costs in us of one layer's n activated experts: one entry an expert in every array.

    cpu_us, accel_us, transfer_us: finite, at least 0; resident: booleans. The three ready times say when each lane
    gets free. ``arrival_us`` (optional) is for residents whose bytes are still under way from an earlier transfer of
    the same link, so at most ``link_ready_us``: the accelerator may not start them before. Not read for the others.
    ``host_us`` (optional): until the expert's bytes have been read from disk into host memory, 0 where they are there;
    neither CPU nor link may start on them before. A resident has 0, or inf where it has no copy there: it stays where
    it is.
    Raises CostError for anything else.
    """

    cpu_us: npt.ArrayLike
    accel_us: npt.ArrayLike
    transfer_us: npt.ArrayLike
    resident: npt.ArrayLike
    cpu_ready_us: float = 0.0
    accel_ready_us: float = 0.0
    link_ready_us: float = 0.0
    arrival_us: npt.ArrayLike | None = None
    host_us: npt.ArrayLike | None = None
    table: Floats = field(init=False, repr=False)
    ready: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cpu = _numbers("cpu_us", self.cpu_us)
        n = cpu.size
        if n == 0:
            raise CostError("no activated experts: expected at least 1 entry in cpu_us")
        host = None if self.host_us is None else _numbers("host_us", self.host_us, n).astype(np.float64)
        waiting = host is not None and bool(np.any(host != 0.0))
        table = np.empty((6 if waiting else 5, n))
        table[CPU] = cpu
        table[ACCEL] = _numbers("accel_us", self.accel_us, n)
        table[TRANSFER] = _numbers("transfer_us", self.transfer_us, n)
        table[ARRIVAL] = 0.0 if self.arrival_us is None else _numbers("arrival_us", self.arrival_us, n)
        table[PRIORITY] = 0.0
        ready = np.array((self.cpu_ready_us, self.accel_ready_us, self.link_ready_us), np.float64)
        if not accept(table, ready, _booleans(self.resident, n)):
            _name_the_bad(table, ready)
        if waiting:
            table[HOST] = _until_in_host_memory(host, table[ARRIVAL])
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "ready", ready)

    def __len__(self) -> int:
        return int(self.table.shape[1])


@dataclass(frozen=True, slots=True)
class BalancePlan:
    """Positions (0..n-1) in execution order; ``transfers`` in link order. No schedule can beat ``bound_us``.

    ``bound_us`` equals ``makespan_us`` where the policy proved its plan optimal, and is 0 for the heuristics.
    """

    cpu: tuple[int, ...]
    accel: tuple[int, ...]
    transfers: tuple[int, ...]
    makespan_us: float
    bound_us: float = 0.0


def new_plan(n: int) -> npt.NDArray[np.int64]:
    """An empty plan int64[3, n + 1] of n active experts, see ``COUNT``."""
    return np.zeros((3, n + 1), np.int64)


@compiled
def accept(table: Floats, ready: Floats, resident: npt.NDArray[np.bool_]) -> bool:
    """Whether all costs and times can be; if so, marks who is not resident in the arrival row."""
    for row in range(4):
        for value in table[row]:
            if not 0.0 <= value < np.inf:
                return False
    for value in ready:
        if not 0.0 <= value < np.inf:
            return False
    for position in range(resident.size):
        if not resident[position]:
            table[ARRIVAL, position] = NOT_RESIDENT
        elif table[ARRIVAL, position] > ready[LINK]:
            return False
    return True


def _until_in_host_memory(host_us: Any, arrival: Floats) -> Floats:
    """The row HOST of experts with these times. Raises CostError for one that can run nowhere."""
    for position, us in enumerate(host_us.tolist()):
        resident = arrival[position] >= 0.0
        if not (us in (0.0, np.inf) if resident else 0.0 <= us < np.inf):
            expected = "0 or inf for a resident" if resident else "a finite number of at least 0 for one without a slot"
            raise CostError(f"host_us[{position}]: expected {expected}, found {us}")
    return np.asarray(np.minimum(host_us, NEVER_US), np.float64)


def _numbers(name: str, values: npt.ArrayLike, n: int | None = None) -> npt.NDArray[Any]:
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise CostError(f"{name}: expected real numbers, found dtype {array.dtype}")
    if array.ndim != 1 or (n is not None and array.size != n):
        raise CostError(f"{name}: expected shape ({'n' if n is None else n},), found {array.shape}")
    return array


def _booleans(values: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.shape != (n,):
        raise CostError(f"resident: expected shape ({n},), found {array.shape}")
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iu" and bool(np.all((array == 0) | (array == 1))):
        return array.astype(np.bool_)
    raise CostError(f"resident: expected booleans, found dtype {array.dtype}")


def _name_the_bad(table: Floats, ready: Floats) -> NoReturn:
    for name, row in zip(("cpu_us", "accel_us", "transfer_us", "arrival_us"), table, strict=False):
        for position, value in enumerate(row):
            if not 0.0 <= value < np.inf and not (name == "arrival_us" and value == NOT_RESIDENT):
                raise CostError(f"{name}[{position}]: expected a finite number of at least 0, found {value}")
    for name, value in zip(("cpu_ready_us", "accel_ready_us", "link_ready_us"), ready, strict=True):
        if not 0.0 <= value < np.inf:
            raise CostError(f"{name}: expected a finite number of at least 0, found {value}")
    late = int(np.argmax(table[ARRIVAL]))
    raise CostError(
        f"arrival_us[{late}] {table[ARRIVAL, late]} is after link_ready_us {ready[LINK]}: a link is in order"
    )

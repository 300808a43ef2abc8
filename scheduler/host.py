"""What a planner is told of host memory that holds some of the experts, while the others are on disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.balancing.problem import HOST, NEVER_US
from scheduler.compiled import compiled

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class HostView:
    """Host memory as it is when a layer is planned: its experts' reads have begun.

    waits_us float64[A]: of each active expert, us from now until it is in host memory; 0 where it is there, inf where
    no read of it was begun, since a slot holds it. held bool[n_layers * n_experts]: what is in host memory. reads: what
    this call has begun to read, see ``LayerPlan``. Layers are numbered as outside of a planner.
    """

    waits_us: Floats
    held: Bools
    reads: tuple[tuple[int, int], ...] = ()

    def copied(self) -> HostView:
        """With arrays of its own."""
        return HostView(self.waits_us.copy(), self.held.copy(), self.reads)


@compiled
def fill_waits(table: Floats, waits_us: Floats) -> None:
    """The row HOST of a cost table float64[6, A], see ``balancing.problem``."""
    for i in range(waits_us.size):
        table[HOST, i] = min(waits_us[i], NEVER_US)


@compiled
def price_of_absence(
    key_of: npt.NDArray[np.int64], held: Bools, keep: Floats, saving_us: Floats, read_us: Floats, n_experts: int,
    priced: Floats,
) -> None:  # fmt: skip
    """priced float64[n_keys] = ``keep``, and for experts that only a slot and the disk have also what it costs to read
    them back, times the chance that they are needed in the time for which ``keep`` counts uses.

    saving_us, read_us float64[n_layers]: us that one use of a resident saves, and that one read takes.
    """
    priced[:] = keep
    for key in key_of:
        if key >= 0 and not held[key]:
            layer = key // n_experts
            uses = max(keep[key], 0.0) / saving_us[layer] if saving_us[layer] > 0.0 else 0.0
            priced[key] = keep[key] + read_us[layer] * (1.0 - np.exp(-uses))

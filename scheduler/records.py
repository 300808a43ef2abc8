"""What really ran: one :class:`TaskRecord` per task, written by the executor or by the simulator."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Lane = Literal["cpu", "accel", "link", "disk"]
TaskKind = Literal[
    "attention",
    "gate",
    "shared_expert",
    "cpu_expert",
    "accel_expert",
    "transfer",
    "evict",
    "prefetch",
    "read",
    "combine",
]

LANES: tuple[Lane, ...] = ("cpu", "accel", "link", "disk")
NO_EXPERT = -1


def lane_name(lane: Lane, accelerator: int) -> str:
    """Name of a lane: its kind, and from the second accelerator on its number."""
    return f"{lane}:{accelerator}" if accelerator else lane


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One executed task.

    Times are microseconds since any fixed origin that all records of a run share. ``layer`` is the MoE
    layer index, ``expert`` is ``-1`` for tasks that belong to no expert, ``step`` the planner's step number,
    ``accelerator`` the index of the accelerator, or of the link; 0 for the CPU and the disk.
    """

    lane: Lane
    kind: TaskKind
    layer: int
    expert: int
    n_tokens: int
    bytes: int
    start_us: float
    end_us: float
    step: int = 0
    accelerator: int = 0

    @property
    def lane_name(self) -> str:
        """The lane; of the second and further accelerators (``accelerator`` 1, 2, ...) with its number: ``accel:1``."""
        return lane_name(self.lane, self.accelerator)

    @property
    def duration_us(self) -> float:
        """Wall time of the task."""
        return self.end_us - self.start_us

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

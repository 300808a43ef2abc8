"""Predicted durations: CPU and accelerator us of one expert by tokens, link us of one expert; corrected by drift.

Shape of a cost: a memory floor (the expert's bytes must be read, however few tokens there are), then linear in
tokens (arithmetic). Measured tables replace the formula point by point. What really ran is fed back with
``observe``; an exponentially weighted mean of observed / predicted, kept within bounds, scales each lane. Experts that
an accelerator is given together take one launch more than they take each, which is learnt apart (``launch_us``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.errors import CostError, ProfileError, did_you_mean
from scheduler.machine.profile import AccelProfile, DiskProfile, HardwareProfile, ModelShape, table_key
from scheduler.plan import ObservedTask

Floats = npt.NDArray[np.float64]

GRID_TOKENS: Final = 512
"""Costs of 0..GRID_TOKENS tokens are tabulated; beyond, the last slope goes on."""
DRIFT_WEIGHT: Final = 0.05
"""Weight of one observation in the moving mean: about 20 observations to follow a change."""
OUTLIER: Final = 1.5
"""One observation counts as at most this many times the drift so far, and at least its inverse: a task that the
operating system interrupted says nothing about the next one. A real change of 4 times is followed in 57 tasks."""
DRIFT_BOUNDS: Final = (0.25, 4.0)
"""A lane is never believed to be more than 4 times slower or faster than its profile says."""
DISK_BOUNDS: Final = (1.0 / 64.0, 64.0)
"""A disk may be another one than the profile's, or its file already in somebody's memory."""
UNKNOWN_DISK: Final = DiskProfile(gbps=1.0)
"""Of machines of which nobody has said how fast their disk is: a SATA disk or a slow share of a network."""
LAUNCH_EXPERTS: Final = 4.0
"""A launch is never believed to take longer than so many experts on one token."""
SAME_SIZE: Final = 0.25
"""Groups whose experts differ by less than this share of their expected time say little about what one takes."""
TILE_STEP: Final = 8
"""Columns by which tiles grow: those of one instruction of the tensor units."""
LAUNCH, BEFORE, TOOK = range(3)
RECORDED: Final = 1
"""Places of ``CostModel._groups``."""
LANES: Final = {"cpu": 0, "accel": 1, "link": 2}


class CostModel:
    """Costs of every MoE layer of one model on one machine. All layers of one expert size share one table."""

    def __init__(
        self,
        profile: HardwareProfile,
        shape: ModelShape,
        dtype: str = "bfloat16",
        record_bytes: int | Sequence[int] | None = None,
        step_tokens: int | None = None,
    ) -> None:
        """``record_bytes``: what really crosses the link for one expert (all layers, or one number a layer).

        ``step_tokens``: tokens of the steps whose costs these are, for accelerators whose tiles follow from that; None:
        steps of any number, with the widest tiles.
        """
        if dtype not in profile.cpu.gflops:
            raise ProfileError(f"{profile.name} has no CPU rate for {dtype!r}{did_you_mean(dtype, profile.cpu.gflops)}")
        given = shape.expert_bytes(dtype) if record_bytes is None else record_bytes
        sizes = [given] * shape.n_layers if isinstance(given, int) else [int(b) for b in given]
        if len(sizes) != shape.n_layers or min(sizes) < 1:
            raise CostError(f"record_bytes: expected {shape.n_layers} positive sizes, found {sizes}")
        kinds = sorted(set(sizes))
        flops = float(shape.expert_flops())
        key = table_key(shape.hidden, shape.inter, dtype)
        tokens = np.arange(GRID_TOKENS + 2, dtype=np.float64)
        cpu, accel = profile.cpu, profile.accel
        cpu_rows = [
            _curve(tokens, cpu.overhead_us, size / (cpu.read_gbps * 1e3), flops / (cpu.gflops[dtype] * 1e3),
                   cpu.table.get(key, ()))
            for size in kinds
        ]  # fmt: skip
        accel_rows = [_accel_curve(tokens, accel, shape, size, accel.table.get(key, ()), step_tokens) for size in kinds]
        link = [profile.link.latency_us + size / (profile.link.gbps * 1e3) for size in kinds]
        disk = UNKNOWN_DISK if profile.disk is None else profile.disk
        read = [size / (disk.gbps * 1e3) for size in kinds]
        self._build(
            np.array([kinds.index(size) for size in sizes], np.int64), np.array(cpu_rows), np.array(accel_rows),
            np.array(link, np.float64), profile.contention.cpu_with_link, profile.contention.link_with_cpu,
            profile.dense.attention_us + profile.dense.gate_us + profile.dense.sync_us, np.array(read, np.float64),
            disk.latency_us,
        )  # fmt: skip

    @classmethod
    def uniform(
        cls,
        n_layers: int,
        cpu_us: float = 100.0,
        accel_us: float = 20.0,
        transfer_us: float = 300.0,
        cpu_us_per_token: float = 0.0,
        accel_us_per_token: float = 0.0,
        dense_us: float = 0.0,
        read_us: float = 0.0,
        read_latency_us: float = 0.0,
    ) -> CostModel:
        """The same made-up costs in every layer: ``cpu_us + (n - 1) * cpu_us_per_token`` and so on. For tests."""
        model = cls.__new__(cls)
        tokens = np.arange(GRID_TOKENS + 2, dtype=np.float64)
        cpu = np.where(tokens > 0, cpu_us + (tokens - 1) * cpu_us_per_token, 0.0)
        accel = np.where(tokens > 0, accel_us + (tokens - 1) * accel_us_per_token, 0.0)
        model._build(
            np.zeros(n_layers, np.int64),
            cpu[None],
            accel[None],
            np.array([transfer_us], np.float64),
            1.0,
            1.0,
            dense_us,
            np.array([read_us], np.float64),
            read_latency_us,
        )
        return model

    def as_mapping(self) -> dict[str, Any]:
        """Plain data of tables, contention and drift as they are now."""
        return {
            "kind": self.kind.tolist(), "cpu": self.cpu_grid.tolist(), "accel": self.accel_grid.tolist(),
            "link": self.link_us.tolist(), "cpu_with_link": self.cpu_with_link, "link_with_cpu": self.link_with_cpu,
            "dense_us": self.dense_us, "read": self._read_us.tolist(), "read_latency_us": self.read_latency_us,
            "drift": self.drift.tolist(), "disk_drift": self.disk_drift, "groups": self._groups.tolist(),
        }  # fmt: skip

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CostModel:
        """The model that ``as_mapping`` described. Raises CostError for impossible values, KeyError for missing."""
        model = cls.__new__(cls)
        model._build(
            np.array(values["kind"], np.int64), np.array(values["cpu"], np.float64),
            np.array(values["accel"], np.float64), np.array(values["link"], np.float64),
            values["cpu_with_link"], values["link_with_cpu"], values["dense_us"],
            np.array(values.get("read", [0.0] * len(values["link"])), np.float64), values.get("read_latency_us", 0.0),
        )  # fmt: skip
        model.drift[:], model.disk_drift = values["drift"], values.get("disk_drift", 1.0)
        model._groups[:] = values.get("groups", 0.0)
        return model

    def _build(
        self, kind: npt.NDArray[np.int64], cpu: Floats, accel: Floats, link: Floats,
        cpu_with_link: float, link_with_cpu: float, dense_us: float, read: Floats, read_latency_us: float,
    ) -> None:  # fmt: skip
        for name, values in (("cpu", cpu), ("accel", accel), ("transfer", link), ("read", read)):
            if not np.all(np.isfinite(values)) or np.any(values < 0):
                raise CostError(f"{name}_us must be finite and not negative")
        self.n_layers = int(kind.size)
        self.kind, self.cpu_grid, self.accel_grid, self.link_us = kind, cpu, accel, link
        self.cpu_with_link, self.link_with_cpu, self.dense_us = cpu_with_link, link_with_cpu, dense_us
        self.cpu_rows = [cpu[k] for k in kind.tolist()]
        self.accel_rows = [accel[k] for k in kind.tolist()]
        self._link_by_layer = [float(link[k]) for k in kind.tolist()]
        self._read_us, self.read_latency_us = read, read_latency_us
        self.drift = np.ones(3)
        """float64[3]: observed / predicted of cpu, accel and link."""
        self.disk_drift = 1.0
        """The same of the disk."""
        self._groups = np.zeros((2, 3))
        """float64[2, 3] of groups launched kernel by kernel, and of recorded ones: us of a launch; of the latest group,
        us that its experts were expected to take without drift, and us that it took."""

    def become(self, other: CostModel) -> None:
        """Takes the other's tables; what was learned by observing stays."""
        learned = self.drift, self.disk_drift, self._groups
        self.__dict__.update(other.__dict__)
        self.drift, self.disk_drift, self._groups = learned

    def cpu_us(self, layer: int, n_tokens: npt.ArrayLike, link_busy: bool = False) -> Floats:
        """us of one expert on ``n_tokens`` tokens (any shape) on the CPU; slower while the link reads host memory."""
        scale = self.drift[0] / (self.cpu_with_link if link_busy else 1.0)
        return np.asarray(_look_up(self.cpu_grid[self.kind[layer]], n_tokens) * scale)

    def accel_us(self, layer: int, n_tokens: npt.ArrayLike) -> Floats:
        """us of one resident expert on ``n_tokens`` tokens (any shape) on the accelerator."""
        return np.asarray(_look_up(self.accel_grid[self.kind[layer]], n_tokens) * self.drift[1])

    def one_token_us(self, layer: int) -> tuple[float, float]:
        """(cpu_us, accel_us) of one expert on one token, without an array on the way."""
        drift = self.drift
        return float(self.cpu_rows[layer][1] * drift[0]), float(self.accel_rows[layer][1] * drift[1])

    def gain_us(self, layer: int, n_tokens: int) -> float:
        """cpu_us - accel_us of one expert on ``n_tokens`` tokens."""
        cpu_row, accel_row, drift = self.cpu_rows[layer], self.accel_rows[layer], self.drift
        if n_tokens <= GRID_TOKENS:
            return float(cpu_row[n_tokens] * drift[0] - accel_row[n_tokens] * drift[1])
        return float(_look_up_one(cpu_row, n_tokens) * drift[0] - _look_up_one(accel_row, n_tokens) * drift[1])

    def transfer_us(self, layer: int, cpu_busy: bool = False) -> float:
        """us of one expert over the link; slower while the CPU reads host memory."""
        return float(self._link_by_layer[layer] * self.drift[2] / (self.link_with_cpu if cpu_busy else 1.0))

    def read_us(self, layer: int) -> float:
        """us for which one expert keeps the disk. Reads that are under way together share its rate; what comes on top
        until the first bytes arrive is ``read_latency_us``."""
        return float(self._read_us[self.kind[layer]] * self.disk_drift)

    def alone_read_us(self) -> Floats:
        """float64[n_layers]: us from the start of a read of each layer's experts to its end, if no other one runs."""
        return np.asarray(self._read_us[self.kind] * self.disk_drift + self.read_latency_us)

    def launch_us(self, layer: int) -> float:
        """us that a group of experts takes on the accelerator beyond ``accel_us`` of each, however many they are: until
        the first of them runs. That of recorded work, which is the device's alone; 0 before such was observed.

        At most as long as LAUNCH_EXPERTS of them: whoever believes more gives the accelerator nothing, and never learns
        otherwise.
        """
        most_us = LAUNCH_EXPERTS * self.accel_rows[layer][1] * self.drift[1]
        return float(min(self._groups[RECORDED, LAUNCH], most_us))

    def observe(self, task: ObservedTask, link_share: float = 0.0) -> None:
        """Moves the lane's drift towards observed / predicted. Raises CostError for a time that cannot be.

        ``link_share``: part of the task's time during which the link worked; a CPU task is expected to be slower then.
        """
        known_lane = task.lane in LANES or task.lane == "disk"
        if not (0.0 <= task.us < np.inf) or not known_lane or not 0 <= task.layer < self.n_layers:
            raise CostError(f"expected a finite us >= 0 of a known lane and layer, found {task}")
        if task.lane == "link":
            self.observe_transfer(task.layer, task.us)
            return
        if task.lane == "disk":
            expected_us = float(self._read_us[self.kind[task.layer]])
            self.disk_drift = _moved(self.disk_drift, task.us, expected_us, DISK_BOUNDS)
            return
        rows = self.cpu_rows if task.lane == "cpu" else self.accel_rows
        expected = _look_up_one(rows[task.layer], task.n_tokens)
        if task.lane == "cpu":
            expected *= 1.0 + link_share * (1.0 / self.cpu_with_link - 1.0)
        if task.group > 0.0:
            self._follow_group(self._groups[int(task.recorded)], expected * task.group, task.us)
            return
        lane = LANES[task.lane]
        self.drift[lane] = _moved(float(self.drift[lane]), task.us, expected, DRIFT_BOUNDS)

    def observe_transfer(self, layer: int, us: float) -> None:
        """``observe`` for one copy over the link, which is expected to have run beside the CPU."""
        if not 0.0 <= us < np.inf:
            raise CostError(f"a transfer took {us} us: expected a finite number of at least 0")
        lane, expected_us = LANES["link"], self._link_by_layer[layer] / self.link_with_cpu
        self.drift[lane] = _moved(float(self.drift[lane]), us, expected_us, DRIFT_BOUNDS)

    def _follow_group(self, groups: Floats, expected_us: float, us: float) -> None:
        """Groups of different sizes tell what an expert takes apart from a launch: by how much one group takes longer
        than the one before, beside how much more its experts were expected to take. What is left is the launch's."""
        if expected_us <= 0.0 or us == 0.0:
            return
        lane = LANES["accel"]
        launch_us, before_us, took_us = groups.tolist()
        known = float(self.drift[lane])
        groups[BEFORE], groups[TOOK] = expected_us, us
        if before_us == 0.0:
            return
        more_us, mean_us = expected_us - before_us, 0.5 * (expected_us + before_us)
        bound_us = (OUTLIER - 1.0) * known * mean_us
        surprise = min(max(us - took_us - known * more_us, -bound_us), bound_us)
        moved = known + DRIFT_WEIGHT * surprise * more_us / (more_us**2 + (SAME_SIZE * mean_us) ** 2)
        rest_us = us - known * expected_us
        bound_us = (OUTLIER - 1.0) * (launch_us + known * expected_us)
        launch_us += DRIFT_WEIGHT * min(max(rest_us - launch_us, -bound_us), bound_us)
        if launch_us < 0.0:  # faster than its experts were believed to be
            moved += launch_us / expected_us
            launch_us = 0.0
        groups[LAUNCH] = launch_us
        self.drift[lane] = min(max(moved, DRIFT_BOUNDS[0]), DRIFT_BOUNDS[1])


def _moved(known: float, us: float, expected_us: float, bounds: tuple[float, float]) -> float:
    """A drift after one more observation."""
    if expected_us <= 0.0 or us == 0.0:
        return known
    seen = min(max(us / expected_us, known / OUTLIER), known * OUTLIER)
    moved = (1.0 - DRIFT_WEIGHT) * known + DRIFT_WEIGHT * seen
    return min(max(moved, bounds[0]), bounds[1])


moved_drift = compiled(_moved)
"""``_moved`` for compiled callers."""


def _accel_curve(
    tokens: Floats, accel: AccelProfile, shape: ModelShape, n_bytes: int, table: Sequence[tuple[int, float]],
    step_tokens: int | None,
) -> Floats:  # fmt: skip
    """us on the accelerator of one expert of ``n_bytes`` for each entry of ``tokens``, in a step of so many tokens."""
    launch_us = 0.0 if accel.expert_launches else accel.launch_us
    read_us = n_bytes / (accel.mem_gbps * 1e3)
    each_us = shape.expert_flops() / (accel.tflops * accel.expert_speed * 1e6)
    if step_tokens is not None and 1 < step_tokens <= accel.vector_tokens:
        return _curve(tokens, launch_us, 0.0, max(read_us, each_us), table)
    apart = accel.reads_apart and step_tokens != 1
    return _curve(_padded(tokens, accel, shape, step_tokens), launch_us, read_us, each_us, table, apart)


def _padded(tokens: Floats, accel: AccelProfile, shape: ModelShape, step_tokens: int | None) -> Floats:
    """Columns that an expert's tiles have for each number of its tokens; the last two entries have half a tile more
    than tokens, since the slope between them goes on beyond the table."""
    if accel.tile_tokens == 0 or step_tokens == 1:
        return tokens
    width = float(accel.tile_tokens)
    if step_tokens is not None:
        mean = step_tokens * shape.top_k / shape.n_experts if accel.tile_by_expert else step_tokens
        width = min(width, TILE_STEP * math.ceil(mean / TILE_STEP))
    columns = np.ceil(tokens / width) * width
    if step_tokens is None:
        columns[1] = 1.0
    columns[-2:] = tokens[-2:] + width / 2
    return np.asarray(columns)


def _curve(
    tokens: Floats, overhead_us: float, floor_us: float, us_per_token: float, table: Sequence[tuple[int, float]],
    apart: bool = False,
) -> Floats:  # fmt: skip
    """us for each entry of ``tokens``: the formula, or the measured points joined by lines; ``apart``: the floor does
    not overlap what tokens take, if there are several."""
    compute_us = tokens * us_per_token
    formula = overhead_us + np.maximum(floor_us, compute_us)
    if apart:
        formula = np.where(tokens > 1, overhead_us + floor_us + compute_us, formula)
    if table:
        at = np.array([n for n, _ in table], np.float64)
        us = np.array([t for _, t in table], np.float64)
        slope = (us[-1] - us[-2]) / (at[-1] - at[-2]) if at.size > 1 else us_per_token
        beyond = us[-1] + np.maximum(tokens - at[-1], 0.0) * max(slope, 0.0)
        formula = np.where(tokens > at[-1], beyond, np.interp(tokens, at, us))
    formula[tokens == 0] = 0.0
    return formula


def _look_up_one(row: Floats, n_tokens: int) -> float:
    last = row.size - 1
    if n_tokens <= last:
        return float(row[n_tokens])
    return float(row[last] + (n_tokens - last) * (row[last] - row[last - 1]))


def _look_up(row: Floats, n_tokens: npt.ArrayLike) -> Floats:
    n = np.asarray(n_tokens)
    inside = row[np.minimum(n, GRID_TOKENS + 1)]
    beyond = np.maximum(n - (GRID_TOKENS + 1), 0) * (row[-1] - row[-2])
    return np.asarray(inside + beyond, np.float64)

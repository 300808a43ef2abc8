"""What the machine and the model look like to the cost model: plain frozen data, no file access.

Units: ``_gbps`` is 10^9 bytes a second, ``_us`` microseconds, ``gflops``/``tflops`` 10^9/10^12 floating point
operations a second (one multiply-add = 2). ``yaml_rules.hardware`` reads these from YAML, ``hybrimoe calibrate``
measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from scheduler.errors import ProfileError, did_you_mean

Provenance = Literal["measured", "datasheet", "fitted"]
CostTable = Mapping[str, tuple[tuple[int, float], ...]]

BYTES_PER_WEIGHT: Mapping[str, float] = {
    "float32": 4.0, "bfloat16": 2.0,
    "int8": 1.0625, "int6": 0.8125, "int5": 0.6875, "int4": 0.5625, "int3": 0.4375, "int2": 0.3125,
}  # fmt: skip
"""Bytes a weight; integers carry one bfloat16 scale for 32 weights (half a bit a weight: 8.5 for int8)."""


def table_key(hidden: int, inter: int, dtype: str) -> str:
    """Key of a measured table: ``"2048x1408/int4"``."""
    return f"{hidden}x{inter}/{dtype}"


@dataclass(frozen=True, slots=True)
class CpuProfile:
    """``table`` maps ``table_key`` to measured ``(n_tokens, us)`` of ONE expert; it beats the formula where present."""

    read_gbps: float
    gflops: Mapping[str, float]
    overhead_us: float = 5.0
    table: CostTable = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AccelProfile:
    """One accelerator; ``count`` like it are in the machine (``memory_gib`` is each one's own).

    ``launch_us``: what a kernel costs beside its work; little where steps are captured as graphs.
    ``attention_launches``: kernels of one attention block. ``expert_launches``: those of all experts of a layer
    together, 0 where each expert is launched alone.
    ``tile_tokens``: in a step of several tokens an expert's tokens are computed in tiles, and an empty column of a tile
    takes as long as a full one. A tile has as many columns as the step has tokens, in eights, and at most so many;
    ``tile_by_expert``: as an expert gets tokens on average. 0: no tiles. ``vector_tokens``: in steps of at most so
    many, each token reads its experts by itself, without tiles. ``reads_apart``: of several tokens, weights are read
    before they are multiplied and not meanwhile. ``expert_speed``: how many times faster an expert's matrices are
    multiplied than others, where the format of its weights is the tensor units' own.
    ``own_attention``: a model's further kernels (``ModelShape.attention_kernels``) are launched, only its
    ``full_attention`` layers read the whole context, and its ``attention_width`` is multiplied. ``cache_share``,
    ``attention_share``: what attention reaches of the memory rate at keys and values, and of the tensor rate.
    ``token_passes``: how often the values between the matrices of several tokens cross the memory.
    """

    mem_gbps: float
    tflops: float
    launch_us: float = 10.0
    memory_gib: float = 0.0
    table: CostTable = field(default_factory=dict)
    count: int = 1
    attention_launches: int = 6
    expert_launches: int = 0
    tile_tokens: int = 0
    tile_by_expert: bool = False
    vector_tokens: int = 1
    reads_apart: bool = False
    expert_speed: float = 1.0
    own_attention: bool = False
    cache_share: float = 1.0
    attention_share: float = 1.0
    token_passes: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Host to device: effective (not nominal) rate of a pinned copy, and what one copy costs beside it.

    Several accelerators have a link each, or one together (``shared``).
    """

    gbps: float
    latency_us: float = 10.0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """Reads of experts past the page cache: their rate together, and what one alone takes beyond its share of it.

    ``reads_in_flight``: the fewest that reach the rate, 0 where nobody has measured it. ``device``: what was measured.
    """

    gbps: float
    latency_us: float = 100.0
    reads_in_flight: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class ContentionProfile:
    """Share of its own rate, in (0, 1], that a lane keeps while the other lane runs (both read host memory)."""

    cpu_with_link: float = 1.0
    link_with_cpu: float = 1.0


@dataclass(frozen=True, slots=True)
class DenseProfile:
    """Costs of a layer's other parts. 0 = unknown: the simulator derives attention from the model shape then.

    ``sync_us``: of every layer, until the host knows the routing. ``handoff_us``: of a layer of which the CPU computes
    experts, the way there and back. ``host_us``: of every step, for dispatch and sampling.
    """

    attention_us: float = 0.0
    gate_us: float = 0.0
    sync_us: float = 0.0
    handoff_us: float = 0.0
    host_us: float = 0.0


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine. ``provenance``: the figures were measured there, come from data sheets, or are fitted to what others
    measured of a software on it."""

    name: str
    provenance: Provenance
    cpu: CpuProfile
    accel: AccelProfile
    link: LinkProfile
    source: str = ""
    disk: DiskProfile | None = None
    contention: ContentionProfile = field(default_factory=ContentionProfile)
    dense: DenseProfile = field(default_factory=DenseProfile)

    def __post_init__(self) -> None:
        _check_profile(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> HardwareProfile:
        """Builds and validates a profile. Raises ProfileError naming the key that is unknown, missing or impossible."""
        values = dict(_known(mapping, cls, "hardware profile"))
        sections: dict[str, Any] = {
            "cpu": CpuProfile, "accel": AccelProfile, "link": LinkProfile,
            "disk": DiskProfile, "contention": ContentionProfile, "dense": DenseProfile,
        }  # fmt: skip
        for key, section in sections.items():
            if values.get(key) is not None:
                inner = dict(_known(values[key], section, f"hardware profile, {key}"))
                if "table" in inner:
                    inner["table"] = _read_table(inner["table"], key)
                values[key] = section(**inner)
            elif key in values and key != "disk":
                raise ProfileError(f"hardware profile: {key} is empty; expected a mapping")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; ``from_mapping`` of it gives an equal profile."""
        mapping = asdict(self)
        for lane in ("cpu", "accel"):
            mapping[lane]["table"] = {k: [[n, us] for n, us in v] for k, v in mapping[lane]["table"].items()}
        return mapping


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that costs depend on. ``n_layers`` counts MoE layers only; ``inter`` is one expert's inner size.

    ``attention_params`` and ``shared_params`` are weights a layer outside the routed experts (projections; shared
    experts and dense MLP), ``head_params`` those of the output head, ``kv_bytes`` cache bytes a token and layer.
    ``max_context`` is the longest sequence in tokens that the model is made for; 0 where nothing limits it.
    ``tower_bytes`` is what the parts take that see images or hear, which text does not go through.
    ``attention_kernels``: kernels a layer beyond those of plain attention. ``attention_width``: query heads times the
    mean width of a key and a value, 0 where that is about ``hidden``. ``full_attention``: the share of layers that
    see the whole context; the others see a window, or keep a state. ``weight_bits``: bits a weight of experts, of the
    output head and of all others in a file of its own format; None where they are those of the dtypes asked for.
    """

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    gated: bool = True
    attention_params: int = 0
    shared_params: int = 0
    head_params: int = 0
    kv_bytes: int = 0
    n_dense_layers: int = 0
    dense_params: int = 0
    max_context: int = 0
    tower_bytes: int = 0
    attention_kernels: int = 0
    attention_width: int = 0
    full_attention: float = 1.0
    weight_bits: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_experts", "top_k", "hidden", "inter"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProfileError(f"model shape {self.name!r}: {name} must be a positive integer, found {value!r}")
        if self.top_k > self.n_experts:
            raise ProfileError(f"model shape {self.name!r}: top_k {self.top_k} is above n_experts {self.n_experts}")
        if not 0.0 < self.full_attention <= 1.0:
            raise ProfileError(
                f"model shape {self.name!r}: full_attention is a share in (0, 1], found {self.full_attention!r}"
            )

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert."""
        return (3 if self.gated else 2) * self.hidden * self.inter

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert's record in this dtype, biases and padding left out."""
        if dtype not in BYTES_PER_WEIGHT:
            raise ProfileError(f"unknown expert dtype {dtype!r}{did_you_mean(dtype, BYTES_PER_WEIGHT)}")
        each = BYTES_PER_WEIGHT[dtype] if self.weight_bits is None else self.weight_bits[0] / 8
        return math.ceil(self.expert_params * each)

    def expert_flops(self, n_tokens: int = 1) -> int:
        """Floating point operations of one routed expert on ``n_tokens`` tokens."""
        return 2 * self.expert_params * n_tokens

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ModelShape:
        """Builds and validates a shape. Raises ProfileError naming the wrong key."""
        return cls(**_known(mapping, cls, "model shape"))


def _known(mapping: Any, cls: Any, where: str) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise ProfileError(f"{where}: expected a mapping, found {type(mapping).__name__}")
    names = {f.name: f for f in fields(cls)}
    for key in mapping:
        if key not in names:
            raise ProfileError(f"{where}: unknown key {key!r}{did_you_mean(str(key), names)}")
    missing = [n for n, f in names.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [n for n in missing if n not in mapping]
    if missing:
        raise ProfileError(f"{where}: missing {', '.join(missing)}")
    return dict(mapping)


def _read_table(table: Any, lane: str) -> dict[str, tuple[tuple[int, float], ...]]:
    if not isinstance(table, Mapping):
        raise ProfileError(f"hardware profile, {lane}.table: expected a mapping, found {type(table).__name__}")
    result = {}
    for key, rows in table.items():
        try:
            points = tuple((int(n), float(us)) for n, us in rows)
        except (TypeError, ValueError) as error:
            raise ProfileError(f"hardware profile, {lane}.table[{key!r}]: expected [n_tokens, us] pairs") from error
        result[str(key)] = points
    return result


def _check_profile(profile: HardwareProfile) -> None:
    if profile.provenance not in get_args(Provenance):
        known = ", ".join(get_args(Provenance))
        raise ProfileError(f"{profile.name}: provenance must be one of {known}, found {profile.provenance!r}")
    if isinstance(profile.accel.count, bool) or not isinstance(profile.accel.count, int) or profile.accel.count < 1:
        raise ProfileError(
            f"{profile.name}: accel.count must be an integer of at least 1, found {profile.accel.count!r}"
        )
    for name, least in (("attention_launches", 0), ("expert_launches", 0), ("tile_tokens", 0), ("vector_tokens", 1)):
        count = getattr(profile.accel, name)
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ProfileError(f"{profile.name}: accel.{name} must be an integer of at least {least}, found {count!r}")
    for name in ("own_attention", "tile_by_expert", "reads_apart"):
        if not isinstance(getattr(profile.accel, name), bool):
            found = getattr(profile.accel, name)
            raise ProfileError(f"{profile.name}: accel.{name} must be true or false, found {found!r}")
    if not isinstance(profile.link.shared, bool):
        raise ProfileError(f"{profile.name}: link.shared must be true or false, found {profile.link.shared!r}")
    positive = {
        "cpu.read_gbps": profile.cpu.read_gbps, "accel.mem_gbps": profile.accel.mem_gbps,
        "accel.tflops": profile.accel.tflops, "link.gbps": profile.link.gbps,
        "accel.cache_share": profile.accel.cache_share, "accel.attention_share": profile.accel.attention_share,
        "accel.expert_speed": profile.accel.expert_speed,
        **{f"cpu.gflops.{k}": v for k, v in profile.cpu.gflops.items()},
    }  # fmt: skip
    if profile.disk is not None:
        positive["disk.gbps"] = profile.disk.gbps
        _number(profile.name, "disk.latency_us", profile.disk.latency_us)
        _number(profile.name, "disk.reads_in_flight", profile.disk.reads_in_flight)
    for name, value in positive.items():
        _number(profile.name, name, value, above_zero=True)
    not_negative = {
        "cpu.overhead_us": profile.cpu.overhead_us, "accel.launch_us": profile.accel.launch_us,
        "accel.token_passes": profile.accel.token_passes,
        "link.latency_us": profile.link.latency_us, "dense.attention_us": profile.dense.attention_us,
        "dense.gate_us": profile.dense.gate_us, "dense.sync_us": profile.dense.sync_us,
        "dense.handoff_us": profile.dense.handoff_us, "dense.host_us": profile.dense.host_us,
    }  # fmt: skip
    for name, value in not_negative.items():
        _number(profile.name, name, value)
    for name in ("cpu_with_link", "link_with_cpu"):
        value = getattr(profile.contention, name)
        _number(profile.name, f"contention.{name}", value, above_zero=True)
        if value > 1:
            raise ProfileError(f"{profile.name}: contention.{name} is a share in (0, 1], found {value!r}")
    for lane, table in (("cpu", profile.cpu.table), ("accel", profile.accel.table)):
        for key, points in table.items():
            _check_points(f"{profile.name}: {lane}.table[{key!r}]", points)


def _number(profile: str, name: str, value: Any, above_zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ProfileError(f"{profile}: {name} must be a finite number, found {value!r}")
    if value < 0 or (above_zero and value == 0):
        raise ProfileError(f"{profile}: {name} must be {'above' if above_zero else 'at least'} 0, found {value!r}")


def _check_points(where: str, points: tuple[tuple[int, float], ...]) -> None:
    if not points:
        raise ProfileError(f"{where} is empty; measure at least one (n_tokens, us)")
    tokens = [n for n, _ in points]
    if tokens != sorted(set(tokens)) or tokens[0] < 1:
        raise ProfileError(f"{where}: n_tokens must rise from at least 1, found {tokens}")
    if any(not math.isfinite(us) or us <= 0 for _, us in points):
        raise ProfileError(f"{where}: every us must be finite and above 0")

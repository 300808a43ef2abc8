"""What of a model fits a machine, and what may be expected of it: behind `hybrimoe plan`. No weights are read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from cpu_kernels import Activation, ExpertSpec
from hybrimoe.errors import BudgetError, ConfigError
from hybrimoe.extensions.policies import open_policy
from hybrimoe.runtime.startup.budget import graph_bytes, kept_free, unpack_bytes
from hybrimoe.tracing.study.public import Setting, speed_range
from scheduler.machine.engine_profile import EngineProfile
from scheduler.machine.profile import BYTES_PER_WEIGHT, HardwareProfile, ModelShape
from scheduler.planner.layer_blocks import layers_of
from scheduler.simulator.run import simulate
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import recorded
from scheduler.traces.synthetic import LOCALITIES, generate
from yaml_rules.engines import load_engine

GIB = 1 << 30
#: Left free in host memory for everything else that runs.
HOST_RESERVE_BYTES = 2 * GIB
#: Tokens of the synthetic run behind the expectation: a short prompt, then decode.
PROMPT_TOKENS, DECODE_TOKENS = 64, 48
DEFAULT_LOCALITY = "olmoe-1b-7b"
#: The engine whose public measurements say how fast a machine of data sheets really is.
ENGINE = "llama_cpp"
#: Tokens that are planned for where nobody says how many, and the model allows so many.
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes and experts by tier; ``device_bytes`` of each accelerator, 0 on a machine without one. ``device_experts``
    is the sum over ``experts_by_accelerator``. ``max_context`` is the longest context that would fit beside one slot a
    layer (without an accelerator: beside all experts in host memory), at most the model's own. ``kv_bytes`` are
    those of ``replies`` at once, each of ``context`` tokens. Each accelerator leaves ``unpack_bytes`` free for one
    expert that a prompt takes apart, ``workspace_bytes`` for libraries of matrix products (of the cards that take
    most), ``graph_bytes`` for recorded steps, and ``reserve_bytes`` for activations."""

    model: str
    hardware: str
    n_experts: int
    expert_bytes: int
    dense_bytes: int
    kv_bytes: int
    context: int
    replies: int
    device_bytes: int
    host_bytes: int
    device_experts: int
    host_experts: int
    disk_experts: int
    max_context: int
    layers_by_accelerator: tuple[int, ...]
    experts_by_accelerator: tuple[int, ...]
    unpack_bytes: int = 0
    workspace_bytes: int = 0
    graph_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def kept_free_bytes(self) -> int:
        """What each accelerator leaves free beside the KV cache."""
        return self.unpack_bytes + self.workspace_bytes + self.graph_bytes + self.reserve_bytes


def fit(
    shape: ModelShape, profile: HardwareProfile, *, context: int | None, expert_dtype: str, dense_dtype: str,
    device_bytes: int | None, host_bytes: int, replies: int = 1,
) -> Fit:  # fmt: skip
    """Dense weights and KV cache first, then as many experts as there is room for; the rest in host memory, then disk.

    ``replies`` at once have ``context`` tokens each.

    Of several accelerators (``profile.accel.count``) the first has dense weights and KV cache, and each has a block of
    layers in proportion to the room that it has, as in the runtime. Without an accelerator all of it is in host memory.
    ``context`` None: as many tokens as is usual and the model allows. Raises ConfigError for a context beyond the
    model's; BudgetError where dense weights and KV cache alone do not fit, or experts fit nowhere; DemandError for more
    accelerators than layers.
    """
    context = _context(shape, context)
    device = round(profile.accel.memory_gib * GIB) if device_bytes is None else device_bytes
    total, size = shape.n_layers * shape.n_experts, shape.expert_bytes(expert_dtype)
    dense = dense_bytes(shape, dense_dtype)
    kv = replies * context * token_bytes(shape)
    cache = f"KV cache of {context} tokens" if replies == 1 else f"KV cache of {replies} x {context} tokens"
    if not device:
        return _fit_host(shape, profile, (context, replies, cache), dense, kv, size, host_bytes)
    unpacked = unpack_bytes(_expert(shape))
    kept = kept_free(None, graph_bytes(shape.n_layers + shape.n_dense_layers, shape.hidden, _vocabulary(shape)))
    free = kept.total + unpacked
    room = device - dense - kv - free
    if room < 0:
        raise BudgetError(
            f"{shape.name}: dense weights ({_gib(dense)}), {cache} ({_gib(kv)}), one expert unpacked"
            f" ({_gib(unpacked)}) and reserve ({_gib(kept.total)}) do not fit the {_gib(device)} of"
            f" {profile.name}; shorten --context, or use a smaller --dense-dtype"
        )
    rooms = [room, *[max(device - free, 0)] * (profile.accel.count - 1)]
    blocks = layers_of([shape.n_experts] * shape.n_layers, [float(left) for left in rooms])
    by_device = [min(n * shape.n_experts, left // size) for n, left in zip(blocks, rooms, strict=True)]
    slots = sum(by_device)
    in_host = min(total, max(0, host_bytes - HOST_RESERVE_BYTES) // size)
    if in_host + slots < total and profile.disk is None:
        raise BudgetError(
            f"{shape.name}: {total - in_host - slots} of {total} experts fit neither host memory nor device;"
            " hybrimoe calibrate measures the disk, so that they can be planned there"
        )
    spare = device - dense - free - min(total, blocks[0]) * size
    return Fit(
        shape.name, profile.name, total, size, dense, kv, context, replies, device, host_bytes, int(slots),
        int(in_host), int(total - in_host), _longest(shape, spare // replies), tuple(blocks),
        tuple(int(slots) for slots in by_device), unpacked, kept.workspaces,
        kept.graphs, kept.reserve,
    )  # fmt: skip


def _vocabulary(shape: ModelShape) -> int:
    return shape.head_params // shape.hidden


def _expert(shape: ModelShape) -> ExpertSpec:
    """An expert of the shape, as it is while a prompt is computed: its stored dtype does not matter."""
    return ExpertSpec(shape.hidden, shape.inter, "float32", Activation("silu", gated=shape.gated))


def _context(shape: ModelShape, asked: int | None) -> int:
    limit = shape.max_context
    if asked is None:
        return min(DEFAULT_CONTEXT, limit) if limit else DEFAULT_CONTEXT
    if limit and asked > limit:
        raise ConfigError(f"--context {asked} is beyond {shape.name}'s own context of {limit} tokens")
    return asked


def _longest(shape: ModelShape, spare_bytes: int) -> int:
    """Tokens of KV cache that fit, at most the model's context; 0 where not even one fits."""
    fitting = max(0, int(spare_bytes // max(1, token_bytes(shape))))
    return min(fitting, shape.max_context) if shape.max_context else fitting


def _fit_host(
    shape: ModelShape, profile: HardwareProfile, cached: tuple[int, int, str], dense: int, kv: int, size: int,
    host_bytes: int,
) -> Fit:  # fmt: skip
    """Dense weights, KV cache and experts in host memory, in this order; what is left over on disk.

    cached: tokens of each reply, replies at once, and both in words.
    """
    context, replies, cache = cached
    total = shape.n_layers * shape.n_experts
    room = host_bytes - HOST_RESERVE_BYTES - dense - kv
    if room < 0 or (room // size < total and profile.disk is None):
        raise BudgetError(
            f"{shape.name}: dense weights ({_gib(dense)}), {cache} ({_gib(kv)}), experts "
            f"({_gib(total * size)}) and reserve do not fit the {_gib(host_bytes)} of host memory; shorten --context,"
            " use a smaller --expert-dtype or --dense-dtype, name a machine with --hardware, or measure this one's disk"
            " with hybrimoe calibrate"
        )
    in_host = min(total, room // size)
    spare = room + kv - in_host * size
    return Fit(
        shape.name, profile.name, total, size, dense, kv, context, replies, 0, host_bytes, 0, int(in_host),
        int(total - in_host), _longest(shape, spare // replies), (), (),
    )  # fmt: skip


def token_bytes(shape: ModelShape) -> int:
    """Keys and values of one token, in all layers."""
    return shape.kv_bytes * (shape.n_layers + shape.n_dense_layers)


def dense_bytes(shape: ModelShape, dtype: str) -> int:
    """Everything but the routed experts: attention, routers, shared and dense blocks, embedding and head, towers."""
    moe_layer = shape.attention_params + shape.shared_params + shape.hidden * shape.n_experts
    params = shape.n_layers * moe_layer + shape.n_dense_layers * (shape.attention_params + shape.dense_params)
    return round((params + 2 * shape.head_params) * BYTES_PER_WEIGHT[dtype]) + shape.tower_bytes


def expect(
    found: Fit, shape: ModelShape, profile: HardwareProfile, policy: str, expert_dtype: str, dense_dtype: str
) -> dict[str, Any]:
    """Hit rate and speed of a short synthetic run with the slots that fit (simulated).

    A machine that is known from data sheets only is taken as an engine drives it (docs/calibration.md), and each speed
    has the range that public measurements of such machines had; None where none of them is like it.
    """
    name = shape.name.casefold()
    locality = name if name in LOCALITIES else DEFAULT_LOCALITY
    trace = generate(
        shape.n_layers,
        shape.n_experts,
        shape.top_k,
        PROMPT_TOKENS + DECODE_TOKENS,
        n_prefill=PROMPT_TOKENS,
        locality=locality,
    )
    predictions = recorded(trace) if trace.predicted_ids is not None else None
    share = min(1.0, max(found.host_experts, 1) / found.n_experts)
    config = open_policy(policy).simulated(
        n_slots=found.device_experts, cache_ratio=found.device_experts / found.n_experts, expert_dtype=expert_dtype,
        dense_dtype=dense_dtype, context_tokens=found.context, host_ratio=share,
    )  # fmt: skip
    source = DemandSource(trace, predictions)
    engine = EngineProfile.from_mapping(load_engine(ENGINE)) if profile.provenance == "datasheet" else None
    mixed = found.device_experts < found.n_experts
    windows = sys.platform == "win32"
    setting = Setting(profile, mixed, in_memory=share == 1.0)
    machine = profile if engine is None else engine.on(profile, captured=not mixed, windows=windows)
    prefill, decode = simulate(trace, machine, shape, config, source=source)
    speeds = {"decode": 1e3 / decode.latency_ms, "prefill": PROMPT_TOKENS * 1e3 / prefill.latency_ms}
    return {
        "policy": policy,
        "locality": locality,
        "hit_rate": decode.hit_rate,
        "prompt_tokens": PROMPT_TOKENS,
        **{f"{phase}_tokens_per_s": speed for phase, speed in speeds.items()},
        **{
            f"{phase}_tokens_per_s_range": None
            if engine is None
            else speed_range(engine.residuals, setting, phase, speed, PROMPT_TOKENS)
            for phase, speed in speeds.items()
        },
        "from_data_sheets": engine is not None,
        "kind": "simulated",
    }


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"

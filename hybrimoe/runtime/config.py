"""What a Session needs to know, as one frozen dataclass (the YAML form is `hybrimoe.config.deploy.DeployConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cpu_kernels import ExpertDtype
from scheduler import HardwareProfile
from scheduler.lossy import Lossy


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Settings of one session.

    accelerator: "auto", "none", "emulated", or a torch device such as "cuda:0"; several: each gets a block of layers.
    gpu_expert_slots: total over all layers: an int, a float share of all experts in (0, 1], a size ("6GiB"), or "auto".
    expert_dtype: default storage of experts; a layer may override it.
    backend, threads: CPU backend by name and its threads (None: chosen by cpu_kernels).
    policy: preset name, "balance/prefetch/cache"; policy_params go to the planner.
    lookahead: layers ahead whose gates are applied to the current hidden state.
    profile: costs of this machine; None measures a few us per shape when the session is finalised.
    pacing: only for "emulated": link and compute are slowed down to this profile.
    decode_max_tokens: without a bound model, a call with at most this many tokens counts as decode.
    device_wait_s: longest time for which work of an accelerator is waited for; None: by what it should take.
    host_copy: "keep", or "drop": experts that stay in their slots for good leave host memory.
    lossy: a lossy policy between router and planner (scheduler.lossy); None computes what the router asked for.
    kv_reserve_bytes: for "auto" slots on a real device: memory left for the KV cache (None: estimated).
    """

    accelerator: str | tuple[str, ...] = "auto"
    gpu_expert_slots: int | float | str = "auto"
    expert_dtype: ExpertDtype = "bfloat16"
    backend: str = "auto"
    threads: int | None = None
    policy: str = "ours"
    policy_params: Mapping[str, Any] = field(default_factory=dict)
    lookahead: int = 3
    profile: HardwareProfile | None = None
    pacing: HardwareProfile | None = None
    decode_max_tokens: int = 4
    kv_reserve_bytes: int | None = None
    lossy: Lossy | None = None
    device_wait_s: float | None = None
    host_copy: Literal["keep", "drop"] = "keep"

"""From the deployment configuration to the settings of a runtime session."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gpu_kernels.devices import auto_device, device_is_here, indexed, memory_info
from hybrimoe.amounts import Amount
from hybrimoe.config.scheduler import lossy_settings, resolved_policy
from hybrimoe.runtime.config import RuntimeConfig
from scheduler.lossy import resolve_lossy

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig


def runtime_config(config: DeployConfig) -> RuntimeConfig:
    """Settings of a session for `config`; see docs/config.md."""
    accelerators = choose_accelerators(config.accelerator)
    policy, policy_params = resolved_policy(config.scheduler)
    return RuntimeConfig(
        accelerator=accelerators[0] if len(accelerators) == 1 else accelerators,
        gpu_expert_slots=slots_setting(config.memory.gpu_experts),
        expert_dtype="bfloat16" if config.cpu.expert_dtype == "auto" else config.cpu.expert_dtype,
        backend=config.cpu.backend,
        threads=config.cpu.threads if isinstance(config.cpu.threads, int) else None,
        policy=policy,
        policy_params=policy_params,
        lookahead=config.scheduler.lookahead,
        kv_reserve_bytes=_kv_bytes(config.memory.kv, accelerators[0]),
        host_copy=config.memory.host_copy,
        device_wait_s=_wait_seconds(config.device_wait_seconds),
        lossy=resolve_lossy(lossy_settings(config.scheduler.lossy)),
    )


def _wait_seconds(setting: float | str) -> float | None:
    """In the form of `RuntimeConfig.device_wait_s`."""
    if isinstance(setting, str):
        return None if setting == "auto" else math.inf
    return setting


def slots_setting(amount: Amount) -> int | float | str:
    """An amount in the form of `RuntimeConfig.gpu_expert_slots`: count, share, exact size text or "auto"."""
    if amount.kind == "count":
        return int(amount.value)
    if amount.kind == "share":
        return float(amount.value)
    return 0 if amount.kind == "none" else str(amount)


def choose_accelerators(names: tuple[str, ...]) -> tuple[str, ...]:
    """The accelerators to use together: all names, except that what follows "auto" is for machines without one."""
    if names[0] != "auto" or len(names) == 1:
        return names
    return ("auto",) if torch.accelerator.is_available() else names[1:]


def _kv_bytes(amount: Amount, accelerator: str) -> int | None:
    """Bytes to keep free for the KV cache; None where the session estimates them. A share is of the device's memory."""
    if amount.kind == "auto":
        return None
    if amount.kind == "bytes":
        return int(amount.value)
    if accelerator in ("none", "emulated"):
        return None
    device = auto_device() if accelerator == "auto" else torch.device(accelerator)
    if device is None or not device_is_here(device):
        return None
    _, total_bytes = memory_info(indexed(device))
    return int(amount.value * total_bytes)

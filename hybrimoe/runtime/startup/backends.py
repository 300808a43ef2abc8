"""Opens what a session runs on: the accelerator by name and the CPU backend that can run a spec."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cpu_kernels import BackendError, CpuBackend, ExpertSpec, get_backend
from gpu_kernels import Accelerator, AcceleratorError, Pacing, open_accelerator
from gpu_kernels.opening import existing_device
from hybrimoe.errors import ConfigError, DeviceError
from hybrimoe.runtime.config import RuntimeConfig
from scheduler import HardwareProfile


def open_devices(config: RuntimeConfig) -> list[Accelerator]:
    """The accelerators of the configuration; empty for "none". Raises DeviceError where one does not exist,
    ConfigError where the CPU backend of an emulation cannot run."""
    names = (config.accelerator,) if isinstance(config.accelerator, str) else config.accelerator
    require_devices(names)
    pacing = None if config.pacing is None else pacing_of(config.pacing)
    opened: list[Accelerator] = []
    try:
        for name in names:
            found = open_accelerator(name, backend=config.backend, pacing=pacing)
            opened += [] if found is None else [found]
    except (AcceleratorError, BackendError) as error:
        close_all(opened)
        kind = ConfigError if isinstance(error, BackendError) else DeviceError
        raise kind(str(error)) from error
    return opened


def require_devices(names: Sequence[str]) -> None:
    """Raises DeviceError where one of the accelerators is not on this machine; opens none."""
    for name in names:
        if name in ("none", "emulated", "auto"):
            continue
        try:
            existing_device(name)
        except AcceleratorError as error:
            several = f". A list uses all of its devices: {', '.join(names)}; [auto, emulated] takes what is here"
            raise DeviceError(f"{error}{several if len(names) > 1 else ''}") from error


def close_all(accelerators: Sequence[Accelerator]) -> None:
    """Closes each of them."""
    for accelerator in accelerators:
        accelerator.close()


def cpu_threads(config: RuntimeConfig, accelerators: Sequence[Accelerator]) -> int | None:
    """Threads of the CPU lane: as configured; one core less beside emulated accelerators, whose lanes need one.

    Layers follow each other, so of several emulated accelerators one computes at a time.
    """
    if config.threads is not None or all(accelerator.kind != "emulated" for accelerator in accelerators):
        return config.threads
    return max(1, (os.cpu_count() or 1) - 1)


def backend_for(name: str, threads: int | None, spec: ExpertSpec) -> CpuBackend:
    """The backend called `name` if it can run `spec`; "auto" falls back to torch for what its first choice cannot.

    Raises ConfigError with the reason where a backend that was asked for by name cannot run here or not this spec.
    """
    try:
        backend = get_backend(name, threads)
        reason = backend.supports(spec)
        if reason is not None and name == "auto":
            backend = get_backend("torch", threads)
            reason = backend.supports(spec)
    except BackendError as error:
        raise ConfigError(str(error)) from error
    if reason is not None:
        raise ConfigError(f"CPU backend {name!r} cannot run these experts: {reason}. Use backend: auto")
    return backend


def pacing_of(profile: HardwareProfile) -> Pacing:
    """The rates of a hardware profile's link and accelerator, for the emulated accelerator."""
    return Pacing(
        link_gbps=profile.link.gbps,
        link_latency_us=profile.link.latency_us,
        mem_gbps=profile.accel.mem_gbps,
        tflops=profile.accel.tflops,
        launch_us=profile.accel.launch_us,
    )

"""Opens what a session runs on: the accelerator by name and the CPU backend that can run a spec."""

from __future__ import annotations

import os

from cpu_kernels import BackendError, CpuBackend, ExpertSpec, get_backend
from gpu_kernels import Accelerator, AcceleratorError, Pacing, open_accelerator
from hybrimoe.errors import ConfigError, DeviceError
from hybrimoe.runtime.config import RuntimeConfig
from scheduler import HardwareProfile


def open_device(config: RuntimeConfig) -> Accelerator | None:
    """The accelerator of the configuration; None for "none". Raises DeviceError where it does not exist,
    ConfigError where the CPU backend of an emulation cannot run."""
    pacing = None if config.pacing is None else pacing_of(config.pacing)
    try:
        return open_accelerator(config.accelerator, backend=config.backend, pacing=pacing)
    except AcceleratorError as error:
        raise DeviceError(str(error)) from error
    except BackendError as error:
        raise ConfigError(str(error)) from error


def cpu_threads(config: RuntimeConfig, accelerator: Accelerator | None) -> int | None:
    """Threads of the CPU lane: as configured; one core less beside an emulated accelerator, whose lanes need one."""
    if config.threads is not None or accelerator is None or accelerator.kind != "emulated":
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

"""`--fit`: a deployment with the dtypes, tiers, context and replies that this machine has room for, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from cpu_kernels import ExpertDtype
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.tracing.study.fitting import Choice, Wish
    from scheduler.machine.profile import ModelShape

__all__ = ["chosen", "fitted", "most_replies", "stored_shapes", "wished"]

MEASURED_DTYPE: ExpertDtype = "int4"
"""Of the experts with which a machine without a calibration is measured for a moment; only speeds depend on it."""
FEWER_BITS = ("int8", "int4")
"""Of keys and values, where nothing fits in 16 bit."""
IN_HOST = {"none", "emulated"}
"""Accelerators without memory of their own."""


def fitted(deployment: DeployConfig, *, serves: bool = False, told: bool = True) -> DeployConfig:
    """The deployment with what fits. What it sets itself stays as it is.

    serves: several replies at once are planned for. told: says why on stderr. Raises as `chosen`.
    """
    from hybrimoe.config.deploy import read_config

    choice = chosen(deployment, wished(deployment, serves=serves))
    for reason in choice.reasons if told else ():
        render.note(f"fit: {reason}")
    return read_config(deployment, **_changes(deployment, choice, serves=serves))


def chosen(deployment: DeployConfig, wish: Wish) -> Choice:
    """For this machine as it is now: its accelerator, and the host memory that is free.

    Raises what `hybrimoe.checkpoint.meta.model_shape` and `hybrimoe.tracing.study.fitting.choose` raise.
    """
    from hybrimoe.checkpoint.meta import model_shape
    from hybrimoe.machine.calibrate import quick_profile
    from hybrimoe.machine.memory import available_bytes
    from hybrimoe.machine.profiles import hardware_for_plan
    from hybrimoe.tracing.study.fitting import Machine, choose_stored

    shape = model_shape(deployment.model, deployment.vision, deployment.rope)
    profile, _ = hardware_for_plan(None, lambda: quick_profile(shape.hidden, shape.inter, MEASURED_DTYPE))
    device_bytes = 0 if IN_HOST.issuperset(deployment.accelerator) else None
    on_cpu = device_bytes == 0 or not profile.accel.memory_gib
    shapes = stored_shapes(deployment.model, shape, deployment.memory.kv_dtype, on_cpu=on_cpu)
    return choose_stored(shapes, Machine(profile, device_bytes, available_bytes()), wish)


def stored_shapes(model: str | None, shape: ModelShape, kv_dtype: str, *, on_cpu: bool) -> dict[str, ModelShape]:
    """The shape of a model by the dtypes in which its keys and values may be stored, the preferred one first.

    kv_dtype: the one that is settled; auto: any, with attention on the CPU in fewer bits, too. Raises ConfigError for
    what is no such dtype.
    """
    from hybrimoe.checkpoint.meta import with_kv_dtype
    from hybrimoe.tracing.study.fitting import KV_DTYPE

    if kv_dtype != "auto":
        return {kv_dtype: with_kv_dtype(shape, model, kv_dtype)}
    fewer = {name: with_kv_dtype(shape, model, name) for name in FEWER_BITS} if on_cpu else {}
    return {KV_DTYPE: shape} | fewer


def wished(deployment: DeployConfig, *, serves: bool) -> Wish:
    """What a deployment settles itself."""
    from hybrimoe.tracing.study.fitting import Wish

    cpu, kv, parallel = deployment.cpu, deployment.memory.kv, deployment.server.parallel
    return Wish(
        replies=None if not serves or parallel == "auto" else parallel,
        most_replies=most_replies() if serves else 1,
        expert_dtype=None if cpu.expert_dtype == "auto" else cpu.expert_dtype,
        dense_dtype=None if cpu.dense_dtype == "auto" else cpu.dense_dtype,
        kv_bytes=int(kv.value) if kv.kind == "bytes" else None,
    )


def most_replies() -> int:
    """Replies at once of a server for which nothing is said."""
    from hybrimoe.generation.continuous_batching import MOST_PARALLEL

    return MOST_PARALLEL


def _changes(deployment: DeployConfig, choice: Choice, *, serves: bool) -> dict[str, Any]:
    """As `read_config` takes them. Slots stay what the deployment says: auto is what is free once the model is loaded,
    and leaves the memory for keys and values alone."""
    from hybrimoe.tracing.study.fitting import KV_DTYPE

    memory: dict[str, Any] = {}
    if deployment.memory.kv.kind == "auto" and choice.kv_bytes:
        memory["kv"] = f"{choice.kv_bytes}B"
    if deployment.memory.kv_dtype == "auto" and choice.kv_dtype != KV_DTYPE:
        memory["kv_dtype"] = choice.kv_dtype
    if choice.needs_disk and deployment.memory.disk.kind == "none":
        memory["disk"] = "auto"
    changes: dict[str, Any] = {"memory": memory} if memory else {}
    if deployment.cpu.expert_dtype == "auto":
        changes["expert_dtype"] = choice.expert_dtype
    if deployment.cpu.dense_dtype == "auto":
        changes["dense_dtype"] = choice.dense_dtype
    if serves and deployment.server.parallel == "auto":
        changes["server"] = {"parallel": choice.fit.replies}
    return changes

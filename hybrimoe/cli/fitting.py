"""`--fit`: a deployment with the dtypes and tiers that this machine has room for, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpu_kernels import ExpertDtype
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.tracing.study.fitting import Choice

__all__ = ["chosen", "fitted", "told"]

MEASURED_DTYPE: ExpertDtype = "int4"
"""Of the experts with which a machine without a calibration is measured for a moment; only speeds depend on it."""


def chosen(model: str | None, context: int | None = None) -> Choice:
    """For this machine as it is now: its accelerator, and the host memory that is free.

    Raises what `hybrimoe.checkpoint.meta.model_shape` and `hybrimoe.tracing.study.fitting.choose` raise.
    """
    from hybrimoe.checkpoint.meta import model_shape
    from hybrimoe.machine.calibrate import quick_profile
    from hybrimoe.machine.memory import available_bytes
    from hybrimoe.machine.profiles import hardware_for_plan
    from hybrimoe.tracing.study.fitting import choose

    shape = model_shape(model)
    profile, _ = hardware_for_plan(None, lambda: quick_profile(shape.hidden, shape.inter, MEASURED_DTYPE))
    return choose(shape, profile, context=context, device_bytes=None, host_bytes=available_bytes())


def fitted(deployment: DeployConfig) -> tuple[DeployConfig, list[str]]:
    """The deployment with what fits, and lines that say why. What it sets itself stays as it is."""
    from hybrimoe.config.deploy import read_config

    choice, cpu = chosen(deployment.model), deployment.cpu
    changes: dict[str, Any] = {}
    if cpu.expert_dtype == "auto":
        changes["expert_dtype"] = choice.expert_dtype
    if cpu.dense_dtype == "auto":
        changes["dense_dtype"] = choice.dense_dtype
    if choice.needs_disk and deployment.memory.disk.kind == "none":
        changes["memory"] = {"disk": "auto"}
    return read_config(deployment, **changes), told(choice)


def told(choice: Choice) -> list[str]:
    """Why, and what is planned; slots and the memory for keys and values are what is free once the model is loaded."""
    found = choice.fit
    planned = [f"{found.host_experts} of {found.n_experts} experts in host memory"]
    if found.device_bytes:
        planned.append(f"{found.device_experts} in device slots")
    planned.append(f"a context of {found.context} tokens, at most {found.max_context}")
    return [*choice.reasons, f"planned: {', '.join(planned)}"]

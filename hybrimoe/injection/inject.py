"""`inject` puts the operators of the rules into a model; the `Injection` it returns takes them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.errors import ConfigError, HybriMoEError, unknown
from hybrimoe.injection.application import Application
from hybrimoe.injection.guards import MARK, install_guards
from hybrimoe.injection.injection import Injection
from hybrimoe.injection.refusals import refuse_adapted_experts, refuse_second_injection, refuse_wrapped_experts
from hybrimoe.injection.resolve import Resolution, resolve
from hybrimoe.injection.rules import RulesSource, read_rules

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.runtime.config import RuntimeConfig
    from hybrimoe.runtime.session import Session


def inject(
    model: nn.Module,
    rules: RulesSource | None = None,
    accelerator: str | Sequence[str] | None = None,
    gpu_expert_slots: int | float | str | None = None,
    expert_dtype: str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | DeployConfig | None = None,
    *,
    frequencies: npt.NDArray[np.float64] | None = None,
    runtime: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Injection:
    """Replace the experts of a transformers model, as the rules say, by experts that CPU and accelerator share.

    rules: "auto", a shipped name, a file, or inline rules.
    accelerator: "cuda:0" or another torch device, "emulated", "none", "auto", or a list: each gets a block of layers.
    gpu_expert_slots: experts on the accelerator at a time, over all layers: a number, a share in (0, 1], "6GiB", auto.
    expert_dtype: "float32", "bfloat16", "int8" or "int4"; "auto" is bfloat16.
    scheduler: `{"policy": ...}` and parameters, as in the deployment file.
    config: deployment file, preset or mapping; what is given above goes over it. Without one, "auto" and bfloat16.
    frequencies: activation counts [layers, experts] for the first fill of the slots.
    runtime: further fields of `hybrimoe.runtime.config.RuntimeConfig`, such as a profile.
    overrides: further keys of `hybrimoe.load_config`.

    A model on the meta device gets its weights later: the session starts when its store is filled.
    Raises RuleError, ConfigError, ModelError (dense, injected already, offloaded, adapted), UnsupportedExpertsError,
    DeviceError, BudgetError, CheckpointError (a dense weight that is not finite); the model is then as it was.
    """
    deployment = load_config(
        {} if config is None else config,
        accelerator=accelerator if accelerator is None or isinstance(accelerator, str) else list(accelerator),
        gpu_expert_slots=gpu_expert_slots,
        expert_dtype=expert_dtype,
        scheduler=scheduler,
        **overrides,
    )
    if deployment.adapters:
        raise ConfigError(
            f"adapters ({', '.join(deployment.adapters)}) are merged by hybrimoe.load while it reads weights; into"
            " a model in memory PEFT merges them: PeftModel.from_pretrained(model, folder).merge_and_unload()"
        )
    if deployment.rope is not None:
        raise ConfigError(
            "rope: hybrimoe.load stretches a context before it builds a model; one in memory is as its configuration"
            " says: leave it out"
        )
    injection = place_operators(model, deployment, rules, runtime)
    try:
        injection.session.finalize(frequencies=frequencies)
        if not injection.deferred:
            injection.prepare_dense(keep_originals=True)
            injection.compile_step()
    except BaseException:
        injection.take_out()
        raise
    return injection


def place_operators(
    model: nn.Module,
    deployment: DeployConfig,
    rules: RulesSource | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Injection:
    """The first half of `inject`: operators stand in the model and the session's devices are open; the session has no
    experts yet, which `Session.finalize` packs or takes from a store.

    Arguments and errors as in `inject`; the model is as it was where one is raised.
    """
    refuse_second_injection(model)
    refuse_adapted_experts(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bound = read_rules(deployment.located_rules() if rules is None else rules, model_type)
    resolution = resolve(model, bound)
    refuse_wrapped_experts(model, [hit.path for hit in resolution.experts])
    session = _new_session(runtime_settings(deployment, runtime))
    application = Application(model, session, resolution)
    try:
        _apply(application, resolution)
        session.open(model)
    except BaseException:
        application.undo()
        session.close()
        raise
    injection = Injection(model, deployment.with_dtypes(expert=session.config.expert_dtype), resolution, application)
    model.__dict__[MARK] = injection
    install_guards(model)
    return injection


def runtime_settings(deployment: DeployConfig, extra: Mapping[str, Any] | None) -> RuntimeConfig:
    """The session's settings: the deployment's, with `extra` fields on top. Raises ConfigError for unknown ones."""
    from hybrimoe.config.runtime import runtime_config
    from hybrimoe.runtime.config import RuntimeConfig

    fields = RuntimeConfig.__dataclass_fields__
    for name in extra or {}:
        if name not in fields:
            raise ConfigError(unknown("runtime setting", name, fields))
    return replace(runtime_config(deployment), **(extra or {}))


def _new_session(settings: RuntimeConfig) -> Session:
    from hybrimoe.runtime.session import Session

    return Session(settings)


def _apply(application: Application, resolution: Resolution) -> None:
    """Experts in the order of execution (their index is the layer's), then everything else in the model's order."""
    done = {hit.path for hit in resolution.experts}
    for hit in (*resolution.experts, *(hit for hit in resolution.hits if hit.path not in done)):
        try:
            application.apply(hit)
        except HybriMoEError as error:
            error.add_note(f"while applying {hit.rule.where()} to {hit.path}")
            raise

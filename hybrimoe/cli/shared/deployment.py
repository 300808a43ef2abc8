"""The deployment that a command line describes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig, RopeConfig

OPTION_OF_KEY = {
    "accelerator": "--accelerator", "memory.gpu_experts": "--slots", "memory.host": "--host-memory",
    "memory.kv_dtype": "--kv-dtype", "cpu.expert_dtype": "--dtype", "cpu.threads": "--threads",
    "scheduler.policy": "--policy", "scheduler.lookahead": "--lookahead", "scheduler.lossy": "--lossy",
    "generation.attention_sinks": "--attention-sinks", "rope.scaling": "--rope-scaling",
    "rope.factor": "--rope-scale", "rope.original_context": "--yarn-orig-ctx",
}  # fmt: skip
"""Options by the key of a deployment file that they stand for."""


@contextlib.contextmanager
def _options_named() -> Iterator[None]:
    """A ConfigError names the option that a value came from, not the key that it stands for."""
    from hybrimoe.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        told = re.sub(
            r"^<option>: ([\w.]+)(?=:)", lambda found: OPTION_OF_KEY.get(found[1], found[0]), str(error), flags=re.M
        )
        raise ConfigError(told) from error


@_options_named()
def deploy_config(
    config: str | None,
    *,
    model: str | None,
    accelerator: str | None = None,
    slots: str | None = None,
    host_memory: str | None = None,
    host_copy: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    policy: str | None = None,
    threads: int | None = None,
    lookahead: int | None = None,
    lossy: str | None = None,
    unknown_keys: str | None = None,
    vision: str | None = None,
    speculate: bool | None = None,
    context_shift: bool | None = None,
    attention_sinks: int | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    rope_original_context: int | None = None,
    adapter: list[str] | None = None,
    weights: bool = True,
) -> DeployConfig:
    """The deployment that a command line describes: a file or preset, with the given options on top.

    Its model, rules and policies must be there, and with `weights` the model's weights: commands come here before they
    import torch and transformers, so that what is wrong is said at once. Raises ConfigError, ModelError,
    CheckpointError and RuleError.
    """
    from hybrimoe.checkpoint.adapters.settings import check_adapters
    from hybrimoe.checkpoint.source import check_model
    from hybrimoe.config.deploy import read_config
    from hybrimoe.config.scheduler import lossy_option

    deployment = read_config(
        config,
        model=model,
        accelerator=_names(accelerator),
        gpu_expert_slots=slots,
        memory=None if host_memory is None else {"host": host_memory, "disk": "auto"},
        host_copy=host_copy,
        expert_dtype=dtype,
        kv_dtype=kv_dtype,
        policy=policy,
        threads=threads,
        lookahead=lookahead,
        lossy=None if lossy is None else lossy_option(lossy),
        unknown_keys=unknown_keys,
        vision=vision,
        speculate=speculate,
        context_shift=context_shift,
        attention_sinks=attention_sinks,
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        rope_original_context=rope_original_context,
        adapters=adapter,
    )
    check_model(deployment.model, weights=weights)
    check_adapters(deployment.adapters)
    check_rules(deployment.rules)
    deployment.check_scheduler()
    return deployment


@_options_named()
def rope_config(scaling: str | None, factor: float | None, original_context: int | None) -> RopeConfig | None:
    """What the options of a command without a deployment say of a model's context. Raises ConfigError."""
    from hybrimoe.config.deploy import read_config

    return read_config({}, rope_scaling=scaling, rope_factor=factor, rope_original_context=original_context).rope


def check_rules(rules: Any) -> None:
    """Raises RuleError where `rules` (a shipped name, a file, or inline) cannot be read; operators come later."""
    from hybrimoe.errors import RuleError
    from yaml_rules.errors import YamlRulesError
    from yaml_rules.loader import load_rules

    if isinstance(rules, str) and rules != "auto":
        try:
            load_rules(rules)
        except YamlRulesError as error:
            raise RuleError(str(error)) from error


def _names(accelerator: str | None) -> str | list[str] | None:
    return [name.strip() for name in accelerator.split(",")] if accelerator and "," in accelerator else accelerator

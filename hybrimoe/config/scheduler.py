"""The scheduler section of a configuration, and its check against the policies that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field

from hybrimoe.amounts import parse_amount
from hybrimoe.config.errors import locate
from hybrimoe.config.values import Section
from hybrimoe.errors import ConfigError, did_you_mean
from yaml_rules.errors import YamlRulesError
from yaml_rules.located import Located, plain_value

DEFAULT_POLICY = "ours"
_PARTS = ("balance", "prefetch", "cache")


class SchedulerConfig(Section):
    """A policy by name, or its three parts; further keys are parameters of the parts."""

    model_config = ConfigDict(extra="allow", frozen=True)

    policy: str | None = Field(
        default=None,
        description="Preset such as ours, hybrimoe, static; balance/prefetch/cache; or a policy's file.",
    )
    balance: str | None = Field(default=None, description="Who computes which expert; replaces the preset's.")
    prefetch: str | None = Field(default=None, description="What is transferred ahead; replaces the preset's.")
    cache: str | None = Field(default=None, description="What stays in the slots; replaces the preset's.")
    lookahead: int = Field(default=3, ge=0, le=64, description="Layers ahead whose routers are asked.")
    lossy: str | dict[str, Any] | None = Field(
        default=None,
        description="A lossy policy such as hobbit, or {kind: hobbit, t1: 0.6}; none (the default) loses nothing.",
    )

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the policy's parts (every key that is no field)."""
        return dict(self.model_extra or {})


def resolved_policy(section: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    """Policy name and parameters as `scheduler.resolve_policy` takes them.

    A part that is named beside a preset replaces the preset's; of the preset's own parameters those stay that the new
    parts know. Raises scheduler.PolicyError for names that do not exist.
    """
    from hybrimoe.extensions.policies import open_policy
    from scheduler import resolve_policy

    base = open_policy(DEFAULT_POLICY if section.policy is None else section.policy)
    chosen = {part: name for part in _PARTS if (name := getattr(section, part)) is not None}
    if not chosen:
        return base.name, {**base.params, **section.parameters}
    preset = resolve_policy(base.name, **base.params)
    name = "/".join(chosen.get(part, getattr(preset, part)) for part in _PARTS)
    open_policy(name)
    kept = {key: value for key, value in preset.params.items() if _knows(name, key, value)}
    return name, {**kept, **section.parameters}


def check_scheduler(section: SchedulerConfig, located: Located, given: Mapping[str, Any]) -> None:
    """Raises ConfigError where a policy, one of its parts or a parameter does not exist; names file and line."""
    from scheduler import resolve_policy
    from scheduler.errors import SchedulerError

    _check_lossy(section, located, given)
    key = next((part for part in ("policy", *_PARTS) if getattr(section, part) is not None), "policy")
    try:
        name, _ = resolved_policy(section)
        resolve_policy(name)
        for key, value in section.parameters.items():
            resolve_policy(name, **{key: value})
    except (SchedulerError, ConfigError, TypeError) as error:
        near = did_you_mean(key, type(section).model_fields) if key in section.parameters else ""
        where = locate(("scheduler", key), located, given)
        raise ConfigError(f"{where}: scheduler.{key}: {error.args[0] if error.args else error}{near}") from error


def lossy_option(text: str) -> dict[str, Any]:
    """`kind` or `kind:name=value,name=value` of a command line as the mapping that a deployment file has.

    Raises ConfigError for a part without `=`; kind, names and values are checked where the mapping is used.
    """
    kind, _, rest = text.partition(":")
    found: dict[str, Any] = {"kind": kind.strip()}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise ConfigError(f"lossy {text!r}: expected KIND or KIND:name=value,name=value, found {part!r}")
        try:
            found[name.strip()] = plain_value(value)
        except YamlRulesError as error:
            raise ConfigError(f"lossy {text!r}: {value!r} is no value of a parameter") from error
    return found


def lossy_settings(given: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """The `lossy` entry as `scheduler.lossy.resolve_lossy` takes it: a budget written as "2GiB", "25%" or "64" becomes
    bytes, a share or a number of experts. Raises ConfigError for a text that is no amount."""
    if not isinstance(given, Mapping) or not isinstance(given.get("budget"), str):
        return given
    amount = parse_amount(given["budget"])
    rest = {key: value for key, value in given.items() if key != "budget"}
    if amount.kind == "auto":
        return rest
    if amount.kind == "none":
        raise ConfigError("lossy: budget: expected the experts to keep, found none; leave it out or say how many")
    key = "budget_bytes" if amount.kind == "bytes" else "budget"
    return {**rest, key: float(amount.value) if amount.kind == "share" else int(amount.value)}


def _check_lossy(section: SchedulerConfig, located: Located, given: Mapping[str, Any]) -> None:
    from scheduler.errors import PolicyError
    from scheduler.lossy import resolve_lossy

    try:
        resolve_lossy(lossy_settings(section.lossy))
    except (PolicyError, ConfigError, TypeError) as error:
        raise ConfigError(f"{locate(('scheduler', 'lossy'), located, given)}: scheduler.lossy: {error}") from error


def _knows(policy: str, parameter: str, value: Any) -> bool:
    from scheduler import resolve_policy
    from scheduler.errors import SchedulerError

    try:
        resolve_policy(policy, **{parameter: value})
    except SchedulerError:
        return False
    return True

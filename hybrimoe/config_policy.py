"""Checks the scheduler section of a configuration against the policies that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybrimoe.config_errors import locate
from hybrimoe.errors import ConfigError
from yaml_rules.located import Located

if TYPE_CHECKING:
    from hybrimoe.config import SchedulerConfig


def check_scheduler(section: SchedulerConfig, located: Located, given: Mapping[str, Any]) -> None:
    """Raises ConfigError where a policy, one of its parts or a parameter does not exist; names file and line."""
    try:
        from scheduler import resolve_policy
    except ImportError:
        return
    try:
        resolve_policy(section.policy_name(), **section.parameters)
    except (ValueError, KeyError, TypeError) as error:
        where = locate(("scheduler",), located, given)
        raise ConfigError(f"{where}: scheduler: {error.args[0] if error.args else error}") from error
